// Every byte of the file as hexadecimal cells in the colour of its bits, with an overview of the whole beside it.
const stage = element.querySelector(".stage");
const overview = element.querySelector(".overview");
const LINE = 22; // CSS pixels
const OVERVIEW = 28;
const FONT = "12.5px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace";
let file = null;
let cursor = -1;
let colours = null;
let grid = { columns: 16, cell: 25, letter: 8, bytesAt: 84, textAt: 494 };

/** 16 columns where they fit, 8 on a phone; the offsets take only the digits that the file needs. */
function layOut() {
  const width = stage.clientWidth;
  if (!file || !width) return;
  const context = rows.canvas.getContext("2d");
  context.font = FONT;
  const letter = context.measureText("0").width;
  const digits = Math.max(4, (file.count - 1).toString(16).length);
  const bytesAt = 8 + digits * letter + 10;
  const needed = (columns, cell) => bytesAt + columns * (cell + letter) + 18;
  const columns = needed(16, 2 * letter + 5) <= width ? 16 : 8;
  const cell = Math.min(38, Math.max(2 * letter + 2, (width - bytesAt - 18) / columns - letter));
  grid = { columns, cell, letter, digits, bytesAt, textAt: bytesAt + columns * cell + 10 };
  colours = bytes.colours(element);
  rows.resize(Math.ceil(file.count / columns));
  rows.paint();
  drawOverview();
}

function draw(context, row, y) {
  const { columns, cell, letter, digits, bytesAt, textAt } = grid;
  const start = row * columns;
  context.font = FONT;
  context.fillStyle = colours.faint;
  context.fillText(bytes.hex(start, digits), 8, y + LINE / 2);
  for (let offset = start; offset < Math.min(start + columns, file.count); offset++) {
    const value = file.values[offset];
    const colour = bytes.level(file.bits(offset));
    const x = bytesAt + (offset - start) * cell;
    context.fillStyle = bytes.css[colour];
    context.fillRect(x, y + 1, cell - 2, LINE - 2);
    context.fillStyle = bytes.ink[colour];
    context.fillText(bytes.hex(value, 2), x + (cell - 2 - 2 * letter) / 2, y + LINE / 2 + 1);
    const isPrintable = value >= 32 && value < 127;
    context.fillStyle = isPrintable ? colours.text : colours.faint;
    context.fillText(isPrintable ? String.fromCharCode(value) : "·", textAt + (offset - start) * letter, y + LINE / 2 + 1);
    if (offset === cursor) {
      bytes.frame(context, x, y + 1, cell - 2, LINE - 2);
    }
  }
}

const rows = new bytes.VirtualRows(stage, LINE, draw);

function drawOverview() {
  const height = stage.clientHeight;
  const context = bytes.fit(overview, OVERVIEW, height);
  for (let y = 0; y < height; y++) {
    const start = Math.floor((y / height) * file.count);
    const end = Math.max(start + 1, Math.floor(((y + 1) / height) * file.count));
    const { mean, max } = file.span(start, Math.min(end, file.count));
    context.fillStyle = bytes.css[bytes.level(max)];
    context.fillRect(0, y, OVERVIEW / 2 - 1, 1);
    context.fillStyle = bytes.css[bytes.level(mean)];
    context.fillRect(OVERVIEW / 2, y, OVERVIEW / 2, 1);
  }
}

function at(event) {
  const { columns, cell, letter, bytesAt, textAt } = grid;
  const x = event.clientX - rows.canvas.getBoundingClientRect().left;
  const column = x >= textAt ? Math.floor((x - textAt) / letter) : Math.floor((x - bytesAt) / cell);
  const offset = rows.rowAt(event) * columns + column;
  return column >= 0 && column < columns && offset < file.count ? offset : -1;
}

function mark(offset) {
  if (!file || offset >= file.count) return;
  cursor = offset;
  rows.show(Math.floor(offset / grid.columns));
}

function steps() {
  const { columns } = grid;
  const page = columns * Math.floor(stage.clientHeight / LINE);
  return {
    ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -page, PageDown: page,
    Home: -file.count, End: file.count,
  };
}

function show(document) {
  file = document;
  cursor = -1;
  stage.scrollTop = 0;
  layOut();
}

overview.addEventListener("click", (event) => {
  const share = (event.clientY - overview.getBoundingClientRect().top) / overview.clientHeight;
  bytes.moveCursor(Math.min(file.count - 1, Math.floor(share * file.count)));
});
bytes.pointer(rows.canvas, at, (offset) => file.describe(offset).replaceAll("  ·  ", "\n"));
bytes.onCursor(mark);
bytes.arrowKeys(stage, steps, () => cursor, () => file.count);
new ResizeObserver(layOut).observe(stage);
bytes.follow(element, props, watch, null, show);
