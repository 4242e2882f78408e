"""People in images: verification of pairs, galleries of known people, and identification of people in them."""
