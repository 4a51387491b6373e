// The scored files as a table; a click, or Enter on a name, opens one in the views.
const COLUMNS = ["File", "Model", "Bytes", "Bits per byte", "As coded", "xz", "PNG or FLAC"];

const size = (count) => (count < 10_000 ? bytes.number(Math.round(count)) : count < 1e6 ? `${(count / 1e3).toFixed(1)} k` : `${(count / 1e6).toFixed(2)} M`);

function row(item) {
  const line = bytes.make("tr", item.state);
  const name = bytes.make("th");
  name.scope = "row";
  const button = bytes.make("button", "", item.name);
  button.type = "button";
  button.addEventListener("click", () => book.choose(item));
  name.append(button, bytes.make("span", "kind", item.kind ?? ""));
  line.append(name);
  if (item.state === "error") {
    const cell = bytes.make("td", "sentence", item.message);
    cell.colSpan = COLUMNS.length - 1;
    line.append(cell);
    button.disabled = true;
  } else {
    const other = item.references?.find(({ name: coder }) => coder !== "xz");
    const coders = [item.references?.find(({ name: coder }) => coder === "xz"), other].map((found) => (found ? size(found.bytes) : item.references ? "–" : "…"));
    const figures = [size(item.num_bytes), item.bits_per_byte?.toFixed(3) ?? "–", size(item.total_bits / 8), ...coders];
    line.append(bytes.make("td", "", item.model), ...figures.map((figure) => bytes.make("td", "figure", figure)));
  }
  return line;
}

function draw() {
  element.hidden = book.items.length < 2;
  const table = bytes.make("table");
  const [head, body] = [bytes.make("thead"), bytes.make("tbody")];
  const titles = bytes.make("tr");
  titles.append(...COLUMNS.map((title, i) => Object.assign(bytes.make("th", i > 1 ? "figure" : "", title), { scope: "col" })));
  head.append(titles);
  body.append(...book.items.map(row));
  table.append(head, body);
  element.replaceChildren(table);
  choose();
}

function choose() {
  for (const [i, line] of [...element.querySelectorAll("tbody tr")].entries()) {
    const isOpen = book.items[i].id === book.item?.id;
    line.classList.toggle("open", isOpen);
    line.querySelector("button").setAttribute("aria-pressed", String(isOpen));
  }
}

book.on("items", draw);
book.on("document", choose);
