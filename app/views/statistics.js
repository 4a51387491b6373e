// How the chosen measure is spread over the file and over the selection, and the stretches that stand out most.
const histogram = element.querySelector(".histogram");
const without = element.querySelector("input");
const [head, rows] = ["thead", "tbody"].map((name) => element.querySelector(name));
const BINS = 64;
const BARS = BINS + 2;
const FINE = 8192; // bins that quantiles are read from
const HEIGHT = 120; // CSS pixels
const MOST = 20;
const STRETCH = { image: 24, audio: 32, text: 16, raw: 16 }; // bytes
let bins = { file: null, selection: null };
let chosen = 0; // bar

const isDifference = () => book.shade.measure === MEASURES.difference;

/** The bar of a value: one for each step of the scale, between one for what lies below it and one for what lies above. */
function barOf(value) {
  const { low, high } = book.shade;
  if (value < low) return 0;
  if (value > high) return BARS - 1;
  return 1 + Math.min(BINS - 1, Math.floor(((value - low) / (high - low)) * BINS));
}

/** Counts and figures of the chosen measure over some ranges of bytes. */
function measure(ranges) {
  const { file, shade: { plane } } = book;
  const counts = new Uint32Array(BARS);
  let [count, sum, bits, least, most] = [0, 0, 0, Infinity, -Infinity];
  const every = (take) => {
    for (const [start, end] of ranges) {
      for (let i = start; i < end; i++) if (!Number.isNaN(plane[i]) && !(without.checked && file.isHatched(i))) take(plane[i], i);
    }
  };
  every((value, i) => {
    counts[barOf(value)]++;
    count++;
    sum += value;
    bits += file.units[i];
    if (value < least) least = value;
    if (value > most) most = value;
  });
  // Quantiles come from finer bins over all values, because many may lie beyond the scale.
  const fine = new Uint32Array(FINE);
  const scale = (FINE - 1) / (most - least || 1);
  every((value) => fine[Math.round((value - least) * scale)]++);
  const quantile = (share) => {
    let seen = 0;
    return least + fine.findIndex((number) => (seen += number) >= share * count) / scale;
  };
  return { count, sum, mean: sum / count, most, bits: bits / BITS_UNIT, median: quantile(0.5), high: quantile(0.9), counts };
}

function draw() {
  if (!book.file) return;
  bins = { file: measure([[0, book.file.count]]), selection: book.selection ? measure(book.selection) : null };
  drawFigures();
  drawHistogram();
  for (const [i, name] of ["low", "high"].entries()) {
    element.querySelector(`.axis .${name}`).textContent = book.shade.measure.format([book.shade.low, book.shade.high][i]);
  }
}

function drawFigures() {
  const { format } = book.shade.measure;
  const columns = [["File", bins.file], ...(bins.selection ? [["Selection", bins.selection]] : [])];
  const figures = {
    Bytes: ({ count }) => bytes.number(count),
    Mean: ({ mean }) => format(mean),
    Median: ({ median }) => format(median),
    "Nine of ten below": ({ high }) => format(high),
    Largest: ({ most }) => format(most),
    ...(isDifference() ? { "Difference in all": ({ sum }) => `${sum < 0 ? "−" : "+"}${bytes.number(Math.round(Math.abs(sum)))} bits` } : { "Bits in all": ({ bits }) => bytes.number(Math.round(bits)) }),
  };
  const cells = (tag, scope, texts) => texts.map((text) => Object.assign(bytes.make(tag, "", text), scope ? { scope } : {}));
  const line = (...nodes) => {
    const row = bytes.make("tr");
    row.append(...nodes);
    return row;
  };
  head.replaceChildren(line(bytes.make("td"), ...cells("th", "col", columns.map(([name]) => name))));
  rows.replaceChildren(...Object.entries(figures).map(([name, figure]) => line(
    ...cells("th", "row", [name]), ...cells("td", "", columns.map(([, found]) => (found.count ? figure(found) : "–"))),
  )));
}

/** The bars of the scale, between one for what lies below it and one for what lies above. */
function drawHistogram() {
  const width = histogram.parentElement.clientWidth;
  if (!bins.file || !width) return; // nothing is counted yet
  const context = bytes.fit(histogram, width, HEIGHT);
  const step = width / BARS;
  const colour = (bar) => (bar === 0 ? BELOW : bar === BARS - 1 ? ABOVE : Math.round(((bar - 0.5) / BINS) * 255));
  const tallest = Math.max(1, ...bins.file.counts);
  for (const [bar, count] of bins.file.counts.entries()) {
    // A single byte is still a line that can be seen.
    const height = count ? Math.max(1.5, (count / tallest) * (HEIGHT - 2)) : 0;
    context.fillStyle = book.shade.css[colour(bar)];
    context.fillRect(bar * step, HEIGHT - height, step - 1, height);
  }
  context.fillStyle = bytes.colours(element).faint;
  context.fillRect(0, HEIGHT - 0.5, width, 0.5);
  describeBar();
  if (document.activeElement === histogram) {
    context.strokeStyle = bytes.colours(element).text;
    context.strokeRect(chosen * step - 0.5, 0.5, step, HEIGHT - 1);
  }
  if (!bins.selection?.count) return;
  const own = Math.max(1, ...bins.selection.counts);
  context.strokeStyle = bytes.colours(element).text;
  context.lineWidth = 1.5;
  context.beginPath();
  for (const [bar, count] of bins.selection.counts.entries()) {
    const y = HEIGHT - 1 - (count / own) * (HEIGHT - 3);
    context.lineTo(bar * step, y);
    context.lineTo((bar + 1) * step, y);
  }
  context.stroke();
}

/** Says what the chosen bar stands for. */
function describeBar() {
  const { low, high, measure } = book.shade;
  const edge = (bar) => measure.format(low + ((bar - 1) / BINS) * (high - low));
  const values = chosen === 0 ? `below ${edge(1)}` : chosen === BARS - 1 ? `above ${edge(chosen)}` : `${edge(chosen)} to ${edge(chosen + 1)}`;
  histogram.setAttribute("aria-valuenow", chosen);
  histogram.setAttribute("aria-valuetext", `${values}: ${bytes.number(bins.file.counts[chosen])} bytes`);
}

function chooseBar(bar) {
  chosen = Math.max(0, Math.min(BARS - 1, bar));
  drawHistogram();
}

/** The next byte after the cursor whose value lies in the chosen bar. */
function jump() {
  const { file, shade, cursor } = book;
  for (let i = 1; i <= file.count; i++) {
    const offset = (Math.max(0, cursor) + i) % file.count;
    if (barOf(shade.plane[offset]) === chosen) return book.move(offset);
  }
}

function press(event) {
  const bar = { ArrowLeft: chosen - 1, ArrowDown: chosen - 1, ArrowRight: chosen + 1, ArrowUp: chosen + 1, Home: 0, End: BARS - 1 }[event.key];
  if (bar !== undefined) chooseBar(bar);
  else if (event.key === "Enter") jump();
  else return;
  event.preventDefault();
}

/** The stretches of a few bytes with the most bits, or with the largest differences; none overlaps another. */
function surprises() {
  const { file, shade } = book;
  const value = isDifference() ? (i) => shade.plane[i] || 0 : (i) => file.units[i] / BITS_UNIT;
  const length = Math.min(STRETCH[file.kind], file.count);
  const whole = file.kind === "image" ? 3 : file.bytes_per_sample ?? 1; // a stretch begins with a pixel or a sample
  const best = []; // of each block as long as a stretch, the stretch that begins there and has the largest sum
  let sum = 0;
  for (let i = 0; i < length; i++) sum += value(i);
  for (let start = 0; start + length <= file.count; start++) {
    const block = Math.floor(start / length);
    if (start % whole === 0 && (!best[block] || Math.abs(sum) > Math.abs(best[block].sum))) best[block] = { start, sum };
    if (start + length < file.count) sum += value(start + length) - value(start);
  }
  const found = [];
  for (const stretch of best.filter(Boolean).sort((a, b) => Math.abs(b.sum) - Math.abs(a.sum))) {
    if (found.every(({ start }) => Math.abs(start - stretch.start) >= length)) found.push(stretch);
    if (found.length === MOST) break;
  }
  return found.map(({ start, sum: total }) => ({ start, end: start + length, mean: total / length }));
}

function snippet({ start, end }) {
  const { file } = book;
  if (file.kind === "image" || file.kind === "audio") return file.place(start).replace(/, (red|green|blue)$/, "");
  if (file.kind === "raw") return Array.from(file.values.subarray(start, Math.min(end, start + 8)), (value) => bytes.hex(value, 2)).join(" ");
  let text = "";
  for (let at = bytes.characterStart(file.values, start); at < end; ) {
    const next = bytes.decodeAt(file.values, at);
    text += bytes.visible(next.text);
    at += next.size;
  }
  return `“${text}”`;
}

function drawSurprises() {
  if (!book.file) return;
  const found = surprises();
  element.querySelector(".surprises h2").textContent = isDifference() ? "Largest differences" : "Most surprising places";
  element.querySelector(".surprises .line").textContent = `Stretches of ${STRETCH[book.file.kind]} bytes by ${isDifference() ? "difference" : "bits"} per byte.`;
  const buttons = found.map((stretch) => {
    const button = Object.assign(bytes.make("button"), { type: "button" });
    const figure = bytes.make("span", "figure", isDifference() ? signed(stretch.mean) : stretch.mean.toFixed(2));
    button.append(bytes.make("span", "where", bytes.number(stretch.start)), bytes.make("span", "what", snippet(stretch)), figure);
    button.addEventListener("click", () => {
      book.move(stretch.start);
      book.select([[stretch.start, stretch.end]]);
    });
    const line = bytes.make("li");
    line.append(button);
    return line;
  });
  element.querySelector(".surprises ol").replaceChildren(...buttons);
}

/** After the views: a long file is drawn before it is counted. */
function later(act) {
  let waiting = 0;
  return () => {
    clearTimeout(waiting);
    waiting = setTimeout(act, 30);
  };
}

const [drawLater, surprisesLater] = [later(draw), later(drawSurprises)];
histogram.addEventListener("click", (event) => {
  chooseBar(Math.floor((event.offsetX / histogram.clientWidth) * BARS));
  jump();
});
histogram.addEventListener("keydown", press);
for (const event of ["focus", "blur"]) histogram.addEventListener(event, drawHistogram);
without.addEventListener("change", draw);
new ResizeObserver(drawHistogram).observe(histogram.parentElement);
book.on("document", () => {
  element.hidden = !book.file;
  bins = { file: null, selection: null }; // of the last file
});
for (const event of ["document", "shade"]) {
  book.on(event, drawLater);
  book.on(event, surprisesLater);
}
book.on("selection", drawLater);
