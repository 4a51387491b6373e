// One line about the byte under the cursor, and the bytes that the model would have thought likelier.
const status = element.querySelector(".status");
const list = element.querySelector(".likeliest");
const HINT = "Click a byte in any view, or move with the arrow keys. Drag, or hold Shift, to select.";

function candidate({ value, p }) {
  const chip = bytes.make("li", value === book.file.values[book.cursor] ? "came" : "");
  chip.style.setProperty("--p", p);
  chip.append(bytes.make("b", "", byteName(value)), bytes.make("span", "", percent(p)));
  return chip;
}

async function draw() {
  const { file, cursor } = book;
  if (!file || cursor < 0) {
    status.textContent = HINT;
    return list.replaceChildren();
  }
  status.textContent = book.facts(cursor).join("  ·  ");
  const likeliest = await file.likeliest(cursor);
  if (book.file === file && book.cursor === cursor) list.replaceChildren(...likeliest.map(candidate));
}

for (const event of ["cursor", "document", "shade"]) book.on(event, draw);
