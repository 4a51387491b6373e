// The totals of a scored file beside other ways to store it, or what the page is doing instead.
const root = element.querySelector("section");
const UNIFORM = 8; // bits per byte of random bytes, the end of every bar

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function message({ state, title, text, done }) {
  const box = make("div", `message ${state}`);
  if (state === "working") box.append(make("span", "turning"));
  box.append(make("strong", "", title), make("p", "", text));
  if (done) {
    box.append(make("div", "done"));
    box.lastElementChild.style.width = `${done * 100}%`;
  }
  return [box];
}

function result({ headline, unit, subtitle, bars, notes, facts }) {
  const head = make("div", "headline");
  head.append(make("strong", "", headline), make("span", "", unit));
  const chart = make("div", "bars");
  for (const { label, bits, is_model } of bars) {
    const row = make("div", is_model ? "bar model" : "bar");
    const track = make("div", "track");
    const fill = make("div", "fill");
    fill.style.width = `${Math.min(1, bits / UNIFORM) * 100}%`;
    track.append(fill);
    row.append(make("span", "name", label), track, make("span", "figure", bits.toFixed(2)));
    chart.append(row);
  }
  const list = make("ul", "notes");
  list.append(...notes.map((note) => make("li", "", note)));
  const left = make("div", "totals");
  left.append(head, make("p", "subtitle", subtitle), make("p", "facts", facts));
  const columns = make("div", "columns");
  columns.append(left, chart);
  return notes.length ? [columns, list] : [columns];
}

function draw() {
  const value = props.value;
  root.replaceChildren(...(value.state === "done" ? result(value) : message(value)));
  element.dataset.state = value.state;
}

watch("value", draw);
draw();
