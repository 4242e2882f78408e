"use strict";
const specs = JSON.parse(document.getElementById("specs").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

// A chart takes the page's colours; it is drawn anew when these change, and in black on white for paper.
function draw(onPaper) {
  const night = dark.matches && !onPaper, ink = night ? "#e6ebf0" : "#1b2733", line = night ? "#3a4652" : "#d5dbe3";
  const config = {
    background: "transparent", font: "system-ui, sans-serif", view: { stroke: line },
    axis: { labelColor: ink, titleColor: ink, gridColor: line, domainColor: line, tickColor: line },
    legend: { labelColor: ink, titleColor: ink }, title: { color: ink },
    rule: { color: ink }, range: night ? { category: { scheme: "tableau20" } } : {},
  };
  return Promise.all(Object.entries(specs).map(([id, spec]) =>
    vegaEmbed("#" + CSS.escape(id), spec, { renderer: "svg", actions: false, config }).catch(error => {
      document.getElementById(id).textContent = `This chart could not be drawn: ${error.message}`;
      console.error(error);
    })));
}
draw(false).then(() => document.documentElement.dataset.drawn = "yes");
dark.addEventListener("change", () => draw(false));
addEventListener("beforeprint", () => draw(true));
addEventListener("afterprint", () => draw(false));

// Pictures of one true class alone.
for (const choose of document.querySelectorAll("select.choose")) {
  const list = document.getElementById(choose.dataset.for), count = list.parentElement.querySelector(".count");
  choose.addEventListener("change", () => {
    let shown = 0;
    for (const item of list.children) {
      item.hidden = choose.value !== "" && item.dataset.true !== choose.value;
      shown += !item.hidden;
    }
    count.textContent = `${shown} of ${list.children.length} pictures`;
  });
}

// Lines of a table that hold what was typed.
for (const field of document.querySelectorAll("input.filter")) {
  const rows = document.querySelectorAll(`#${CSS.escape(field.dataset.for)} tbody tr`);
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}
