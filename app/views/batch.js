// The table of a batch. Rows are kept between updates, so that a long table does not jump while it is read.
const { make } = bytes;
const root = element.querySelector("section");
let rows = [];

function makeTable() {
  const table = make("table");
  const head = table.createTHead().insertRow();
  for (const [name, className] of [["State", "state"], ["Source", "source"], ["What is made", "says"]]) {
    const cell = make("th", className, name);
    cell.scope = "col";
    head.append(cell);
  }
  table.append(make("tbody"));
  return table;
}

function makeRow(body) {
  const row = body.insertRow();
  for (const className of ["state", "source", "says"]) row.insertCell().className = className;
  row.cells[0].append(make("span", "mark"), make("span", "word"));
  return row;
}

function update(row, item) {
  const [state, source, says] = row.cells;
  row.className = item.state;
  state.lastElementChild.textContent = item.word;
  source.textContent = item.name;
  says.textContent = item.samples > 1 ? `${item.says}, ${item.samples} samples` : item.says;
  row.style.setProperty("--done", `${item.done * 100}%`);
}

function frame() {
  const scroller = make("div", "scroller");
  scroller.tabIndex = 0;
  scroller.setAttribute("role", "region");
  scroller.setAttribute("aria-label", "Items");
  scroller.append(makeTable());
  const head = make("div", "headline");
  head.append(make("strong"), make("span"), make("a"));
  const bar = make("div", "progress");
  bar.append(make("div", "fill"));
  rows = [];
  root.replaceChildren(head, bar, scroller);
}

function draw() {
  const value = props.value;
  element.dataset.state = value.state;
  if (value.state === "empty") {
    const box = make("div", "message");
    box.append(make("strong", "", value.title), make("p", "", value.text));
    root.replaceChildren(box);
    return;
  }
  if (!root.querySelector("table")) frame();
  const [head, bar, scroller] = root.children;
  const [title, text, link] = head.children;
  title.textContent = value.title;
  text.textContent = value.text;
  link.hidden = !value.file?.url;
  if (value.file?.url) Object.assign(link, { href: value.file.url, download: value.name, textContent: `Download ${value.name}` });
  bar.hidden = value.state !== "running";
  bar.firstElementChild.style.width = `${(value.done ?? 0) * 100}%`;
  const body = scroller.querySelector("tbody");
  while (rows.length < value.rows.length) rows.push(makeRow(body));
  while (rows.length > value.rows.length) rows.pop().remove();
  value.rows.forEach((item, index) => update(rows[index], item));
}

watch("value", draw);
draw();
