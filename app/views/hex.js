// Every byte of the file as hexadecimal cells in its colour, with an overview of the whole beside it.
const stage = element.querySelector(".stage");
const overview = element.querySelector(".overview");
const sight = element.querySelector(".sight");
const jump = element.querySelector("input");
const LINE = 22; // CSS pixels
const OVERVIEW = 28;
const WIDEST = 46; // of a cell
const FONT = "12.5px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace";
let colours = null;
let grid = { columns: 16, cell: 25, letter: 8, bytesAt: 84, textAt: 494 };

/** 16 columns where they fit, 8 on a phone, 32 on a wall; the offsets take only the digits that the file needs. */
function layOut() {
  const { file } = book;
  const width = stage.clientWidth;
  if (!file || !width) return;
  const context = rows.canvas.getContext("2d");
  context.font = FONT;
  const letter = context.measureText("0").width;
  const digits = Math.max(4, (file.count - 1).toString(16).length);
  const bytesAt = 8 + digits * letter + 10;
  const needed = (columns, cell) => bytesAt + columns * (cell + letter) + 18;
  const columns = needed(32, WIDEST) <= width ? 32 : needed(16, 2 * letter + 4) <= width ? 16 : 8;
  const cell = Math.min(WIDEST, Math.max(2 * letter + 2, (width - bytesAt - 18) / columns - letter));
  grid = { columns, cell, letter, digits, bytesAt, textAt: bytesAt + columns * cell + 10 };
  rows.resize(Math.ceil(file.count / columns));
  paint();
}

function paint() {
  colours = bytes.colours(element);
  rows.paint();
  drawOverview();
}

function draw(context, row, y) {
  const { file, shade } = book;
  const { columns, cell, letter, digits, bytesAt, textAt } = grid;
  const start = row * columns;
  context.font = FONT;
  context.fillStyle = colours.faint;
  context.fillText(bytes.hex(start, digits), 8, y + LINE / 2);
  for (let offset = start; offset < Math.min(start + columns, file.count); offset++) {
    const value = file.values[offset];
    const colour = shade.level(shade.plane[offset]);
    const x = bytesAt + (offset - start) * cell;
    context.fillStyle = shade.css[colour];
    context.fillRect(x, y + 1, cell - 2, LINE - 2);
    if (file.isHatched(offset)) bytes.hatch(context, x, y + 1, cell - 2, LINE - 2);
    context.fillStyle = shade.ink[colour];
    context.fillText(bytes.hex(value, 2), x + (cell - 2 - 2 * letter) / 2, y + LINE / 2 + 1);
    const isPrintable = value >= 32 && value < 127;
    context.fillStyle = isPrintable ? colours.text : colours.faint;
    context.fillText(isPrintable ? String.fromCharCode(value) : "·", textAt + (offset - start) * letter, y + LINE / 2 + 1);
    if (book.selection && book.isSelected(offset)) bytes.underline(context, x, y + LINE - 3, cell - 2, colours.text);
    if (offset === book.cursor) bytes.frame(context, x, y + 1, cell - 2, LINE - 2);
  }
}

const rows = new bytes.VirtualRows(stage, LINE, draw);

function drawOverview() {
  const { file, shade } = book;
  const height = stage.clientHeight;
  const context = bytes.fit(overview, OVERVIEW, height);
  for (let y = 0; y < height; y++) {
    const start = Math.floor((y / height) * file.count);
    const end = Math.max(start + 1, Math.floor(((y + 1) / height) * file.count));
    const { mean, extreme } = shade.span(start, Math.min(end, file.count));
    context.fillStyle = shade.css[shade.level(extreme)];
    context.fillRect(0, y, OVERVIEW / 2 - 1, 1);
    context.fillStyle = shade.css[shade.level(mean)];
    context.fillRect(OVERVIEW / 2, y, OVERVIEW / 2, 1);
  }
  drawSight();
}

/** The frame around what the rows show. */
function drawSight() {
  const share = stage.scrollTop / stage.scrollHeight;
  sight.style.top = `${100 * share}%`;
  sight.style.height = `${Math.min(100, (100 * stage.clientHeight) / stage.scrollHeight)}%`;
}

function at(event) {
  const { columns, cell, letter, bytesAt, textAt } = grid;
  const x = event.clientX - rows.canvas.getBoundingClientRect().left;
  const column = x >= textAt ? Math.floor((x - textAt) / letter) : Math.floor((x - bytesAt) / cell);
  const offset = rows.rowAt(event) * columns + column;
  return column >= 0 && column < columns && offset < book.file.count ? offset : -1;
}

const mark = () => rows.paint();
const reveal = () => rows.show(Math.floor(book.cursor / grid.columns));

function steps() {
  const { columns } = grid;
  const { count } = book.file;
  const page = columns * Math.floor(stage.clientHeight / LINE);
  return {
    ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -page, PageDown: page, Home: -count, End: count,
  };
}

function scrollTo(event) {
  if (event.type === "pointermove" && event.buttons !== 1) return;
  const share = (event.clientY - overview.getBoundingClientRect().top) / overview.clientHeight;
  stage.scrollTop = share * stage.scrollHeight - stage.clientHeight / 2;
}

function show() {
  stage.scrollTop = 0;
  layOut();
}

jump.addEventListener("change", () => {
  const offset = Number(jump.value.trim() || NaN);
  const isPlace = Number.isInteger(offset) && offset >= 0 && offset < book.file.count;
  jump.setCustomValidity(isPlace ? "" : `The bytes of this file are numbered 0 to ${book.file.count - 1}.`);
  if (isPlace) book.move(offset);
  else jump.reportValidity();
});
stage.addEventListener("scroll", drawSight);
for (const event of ["pointerdown", "pointermove"]) overview.addEventListener(event, scrollTo);
pointer(rows.canvas, at);
arrowKeys(stage, steps);
new ResizeObserver(layOut).observe(stage);
follow(element, null, { show, paint, mark, reveal });
