"use strict";
const specs = JSON.parse(document.getElementById("specs").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

// Charts use the page's colours: they are drawn again when these change, and in dark on white for print.
function drawCharts(forPrint) {
  const isDark = dark.matches && !forPrint, ink = isDark ? "#e6ebf0" : "#1b2733", line = isDark ? "#3a4652" : "#d5dbe3";
  const config = {
    background: "transparent", font: "system-ui, sans-serif", view: { stroke: line },
    axis: { labelColor: ink, titleColor: ink, gridColor: line, domainColor: line, tickColor: line },
    legend: { labelColor: ink, titleColor: ink }, title: { color: ink },
    rule: { color: ink }, range: isDark ? { category: { scheme: "tableau20" } } : {},
  };
  return Promise.all(Object.entries(specs).map(([id, spec]) =>
    vegaEmbed("#" + CSS.escape(id), spec, { renderer: "svg", actions: false, config }).catch(error => {
      document.getElementById(id).textContent = `This chart could not be drawn: ${error.message}`;
      console.error(error);
    })));
}
drawCharts(false).then(() => document.documentElement.dataset.drawn = "yes");
dark.addEventListener("change", () => drawCharts(false));
addEventListener("beforeprint", () => drawCharts(true));
addEventListener("afterprint", () => drawCharts(false));

// Show the images of one true class only.
for (const select of document.querySelectorAll("select.choose")) {
  const list = document.getElementById(select.dataset.for), count = list.parentElement.querySelector(".count");
  select.addEventListener("change", () => {
    let shown = 0;
    for (const item of list.children) {
      item.hidden = select.value !== "" && item.dataset.target !== select.value;
      shown += !item.hidden;
    }
    count.textContent = `${shown} of ${list.children.length} images`;
  });
}

// Show the rows of a table that contain the typed text.
for (const field of document.querySelectorAll("input.filter")) {
  const rows = document.querySelectorAll(`#${CSS.escape(field.dataset.for)} tbody tr`);
  field.addEventListener("input", () => {
    const text = field.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(text);
  });
}
