// Text in the colours of its characters: monospaced, wrapped at words, only the rows in sight are drawn.
const stage = element.querySelector(".stage");
const LINE = 24; // CSS pixels
const MARGIN = 10;
const ASCII = Array.from({ length: 0x80 }, (_, code) => String.fromCharCode(code));
const FONT = "14px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace";
let colours = null;
let cell = 8.4; // CSS pixels of one column
let columns = 0;
let starts = new Uint32Array(0); // byte at which each row begins, and one more for the end

/** Splits the document into rows of at most `columns` cells, after a space where there is one. */
function wrap() {
  const { file } = book;
  const found = [0];
  let column = 0;
  let lastSpace = -1; // byte after the last space of this row
  for (let offset = 0; offset < file.count; ) {
    const first = file.values[offset];
    const isAscii = first < 0x80; // the usual case, without an object for each byte
    const { size, text } = isAscii ? { size: 1, text: ASCII[first] } : bytes.decodeAt(file.values, offset);
    const cells = isAscii ? 1 : width(text);
    if (column + cells > columns) {
      const start = lastSpace > found.at(-1) ? lastSpace : offset;
      found.push(start);
      column = start === offset ? 0 : cellsBetween(start, offset);
      lastSpace = -1;
    }
    offset += size;
    column += cells;
    if (text === " " || text === "\t") lastSpace = offset;
    if (text === "\n" && offset < file.count) {
      found.push(offset);
      column = 0;
      lastSpace = -1;
    }
  }
  found.push(file.count);
  starts = Uint32Array.from(found);
}

/** Cells of a character: two for those that East Asian and emoji fonts draw wide. */
function width(text) {
  const code = text.codePointAt(0);
  const isWide = (code >= 0x1100 && code < 0x1160) || (code >= 0x2e80 && code < 0xa4d0) || (code >= 0xac00 && code < 0xd7a4)
    || (code >= 0xf900 && code < 0xfb00) || (code >= 0xff00 && code < 0xff61) || code >= 0x1f300;
  return isWide ? 2 : 1;
}

function* characters(start, end) {
  for (let offset = start, column = 0; offset < end; ) {
    const { size, text } = bytes.decodeAt(book.file.values, offset);
    yield { offset, size, text, column };
    offset += size;
    column += width(text);
  }
}

function cellsBetween(start, end) {
  let cells = 0;
  for (const { text } of characters(start, end)) cells += width(text);
  return cells;
}

function draw(context, row, y) {
  const { file, shade, cursor } = book;
  context.font = FONT;
  for (const { offset, size, text, column } of characters(starts[row], starts[row + 1])) {
    const colour = shade.level(shade.span(offset, offset + size).mean);
    const x = MARGIN + column * cell;
    context.fillStyle = shade.css[colour];
    context.fillRect(x, y + 2, width(text) * cell + 0.5, LINE - 4);
    if (file.isHatched(offset)) bytes.hatch(context, x, y + 2, width(text) * cell, LINE - 4);
    context.fillStyle = shade.ink[colour];
    if (text !== " ") context.fillText(bytes.visible(text), x, y + LINE / 2 + 1);
    if (book.selection && book.isSelected(offset)) bytes.underline(context, x, y + LINE - 4, width(text) * cell, colours.text);
    if (cursor >= offset && cursor < offset + size) bytes.frame(context, x, y + 2, width(text) * cell, LINE - 4);
  }
}

const rows = new bytes.VirtualRows(stage, LINE, draw);

function layOut() {
  if (!book.file || !stage.clientWidth) return;
  const context = rows.canvas.getContext("2d");
  context.font = FONT;
  cell = context.measureText("m").width;
  const fitting = Math.max(8, Math.floor((stage.clientWidth - 2 * MARGIN) / cell));
  if (fitting !== columns) {
    columns = fitting;
    wrap();
  }
  rows.resize(starts.length - 1);
  paint();
}

function paint() {
  colours = bytes.colours(element);
  rows.paint();
}

function rowOf(offset) {
  let low = 0;
  let high = starts.length - 2;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (starts[middle] <= offset) low = middle;
    else high = middle - 1;
  }
  return low;
}

function inRow(row, column) {
  let found = starts[row];
  for (const character of characters(starts[row], starts[row + 1])) {
    if (character.column > column) break;
    found = character.offset;
  }
  return found;
}

function at(event) {
  const row = rows.rowAt(event);
  const column = Math.floor((event.clientX - rows.canvas.getBoundingClientRect().left - MARGIN) / cell);
  if (row < 0 || row >= starts.length - 1 || column < 0) return -1;
  return column < cellsBetween(starts[row], starts[row + 1]) ? inRow(row, column) : -1;
}

const mark = () => rows.paint();
const reveal = () => rows.show(rowOf(book.cursor));

function steps() {
  const { values } = book.file;
  const here = Math.max(0, book.cursor);
  const row = rowOf(here);
  const column = cellsBetween(starts[row], here);
  const to = (target) => inRow(Math.max(0, Math.min(starts.length - 2, target)), column) - here;
  const page = Math.floor(stage.clientHeight / LINE);
  const before = here > 0 ? bytes.characterStart(values, here - 1) : 0;
  return {
    ArrowLeft: before - here, ArrowRight: bytes.decodeAt(values, here).size, ArrowUp: to(row - 1), ArrowDown: to(row + 1),
    PageUp: to(row - page), PageDown: to(row + page), Home: starts[row] - here, End: starts[row + 1] - 1 - here,
  };
}

function show() {
  columns = 0;
  stage.scrollTop = 0;
  layOut();
}

pointer(rows.canvas, at);
arrowKeys(stage, steps);
new ResizeObserver(layOut).observe(stage);
follow(element, ["text"], { show, paint, mark, reveal });
