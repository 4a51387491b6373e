// The waveform, as high as its peak, each column in the colour of its mean, over a strip of the same colours; it zooms and plays.
const stage = element.querySelector(".stage");
const canvas = element.querySelector(".wave");
const [marker, chosen, playhead] = ["marker", "chosen", "playhead"].map((name) => element.querySelector(`.${name}`));
const overview = element.querySelector(".overview");
const sight = element.querySelector(".sight");
const seconds = element.querySelector(".seconds");
const playButton = element.querySelector(".play");
const HEIGHT = 200; // CSS pixels
const STRIP = 18;
const OVERVIEW = 22;
const LEAST = 64; // samples in sight
let view = { from: 0, to: 1 }; // samples
let peak = 1;
let player = null;

const sampleOf = (offset) => Math.floor(offset / book.file.bytes_per_sample);
const offsetOf = (sample) => sample * book.file.bytes_per_sample;

function show() {
  const { file } = book;
  view = { from: 0, to: file.num_samples };
  peak = file.samples.reduce((highest, sample) => Math.max(highest, Math.abs(sample)), 1);
  paint();
}

function paint() {
  const width = stage.clientWidth;
  if (!book.file || !width) return;
  drawWave(bytes.fit(canvas, width, HEIGHT), width);
  drawOverview(bytes.fit(overview, width, OVERVIEW), width);
  const time = (sample) => (sample / book.file.sample_rate).toFixed(3);
  seconds.textContent = `${time(view.from)} to ${time(view.to)} s, peak ${((100 * peak) / 32768).toFixed(0)}% of full scale`;
  mark();
}

/** Samples and bytes under column `x` of `width` that show the samples `from` to `to`. */
function columnAt(x, width, from, to) {
  const start = Math.floor(from + (x / width) * (to - from));
  const end = Math.max(start + 1, Math.min(book.file.num_samples, Math.floor(from + ((x + 1) / width) * (to - from))));
  return { start, end, colour: book.shade.level(book.shade.span(offsetOf(start), offsetOf(end)).mean) };
}

function drawWave(context, width) {
  const { file, shade } = book;
  const middle = (HEIGHT - STRIP - 8) / 2;
  context.fillStyle = bytes.colours(element).faint;
  context.fillRect(0, middle, width, 0.5);
  for (let x = 0; x < width; x++) {
    const { start, end, colour } = columnAt(x, width, view.from, view.to);
    let low = 32767;
    let high = -32768;
    for (let i = start; i < end; i++) {
      if (file.samples[i] < low) low = file.samples[i];
      if (file.samples[i] > high) high = file.samples[i];
    }
    context.fillStyle = shade.css[colour];
    context.fillRect(x, middle - (high / peak) * middle, 1, Math.max(1.5, ((high - low) / peak) * middle));
    context.fillRect(x, HEIGHT - STRIP, 1, STRIP);
  }
  drawHatching(context, width);
}

/** Hatched stretches of the strip; one that is narrower than a column cannot be seen at this zoom. */
function drawHatching(context, width) {
  let began = -1;
  for (let x = 0; x <= width; x++) {
    const isHatched = x < width && book.file.isHatched(offsetOf(columnAt(x, width, view.from, view.to).start));
    if (isHatched && began < 0) began = x;
    if (!isHatched && began >= 0) {
      bytes.hatch(context, began, HEIGHT - STRIP, x - began, STRIP);
      began = -1;
    }
  }
}

function drawOverview(context, width) {
  for (let x = 0; x < width; x++) {
    context.fillStyle = book.shade.css[columnAt(x, width, 0, book.file.num_samples).colour];
    context.fillRect(x, 0, 1, OVERVIEW);
  }
}

/** Puts a box where the samples from `start` to `end` are; hides it where they are out of sight. */
function put(box, start, end) {
  const share = (sample) => Math.max(0, Math.min(1, (sample - view.from) / (view.to - view.from)));
  box.hidden = Math.max(end, start + 1) <= view.from || start >= view.to;
  box.style.left = `${100 * share(start)}%`;
  box.style.width = `${100 * (share(end) - share(start))}%`;
}

function mark() {
  const { cursor, selection, file } = book;
  marker.hidden = cursor < 0;
  if (cursor >= 0) put(marker, sampleOf(cursor), sampleOf(cursor) + 1);
  chosen.hidden = !selection;
  if (selection) put(chosen, sampleOf(selection[0][0]), sampleOf(selection.at(-1)[1] - 1) + 1);
  sight.style.left = `${(100 * view.from) / file.num_samples}%`;
  sight.style.width = `${(100 * (view.to - view.from)) / file.num_samples}%`;
}

/** Brings the cursor into sight, in the middle. */
function reveal() {
  const sample = sampleOf(book.cursor);
  if (sample >= view.from && sample < view.to) return mark();
  look(sample - (view.to - view.from) / 2, view.to - view.from);
}

/** Shows `length` samples from `from` on, as far as there are so many. */
function look(from, length) {
  const { num_samples: total } = book.file;
  const wanted = Math.round(Math.max(Math.min(LEAST, total), Math.min(total, length)));
  const start = Math.round(Math.max(0, Math.min(total - wanted, from)));
  view = { from: start, to: start + wanted };
  paint();
}

/** Zooms around the cursor if it is in sight, around the middle otherwise. */
function zoom(factor) {
  const length = (view.to - view.from) * factor;
  const cursor = book.cursor < 0 ? -1 : sampleOf(book.cursor);
  const isInSight = cursor >= view.from && cursor < view.to;
  const share = isInSight ? (cursor - view.from) / (view.to - view.from) : 0.5;
  look(view.from + share * (view.to - view.from - length), length);
}

function at(event) {
  const box = canvas.getBoundingClientRect();
  const sample = Math.floor(view.from + ((event.clientX - box.left) / box.width) * (view.to - view.from));
  return sample >= view.from && sample < view.to ? offsetOf(sample) : -1;
}

function scrollTo(event) {
  if (event.type === "pointermove" && event.buttons !== 1) return;
  const box = overview.getBoundingClientRect();
  const length = view.to - view.from;
  look(((event.clientX - box.left) / box.width) * book.file.num_samples - length / 2, length);
}

function stop() {
  player?.close();
  player = null;
  playhead.hidden = true;
  playButton.textContent = "Play from here";
}

function play() {
  if (player) return stop();
  const { file, selection, cursor } = book;
  const start = selection ? sampleOf(selection[0][0]) : Math.max(0, cursor < 0 ? 0 : sampleOf(cursor));
  const end = selection ? sampleOf(selection.at(-1)[1] - 1) + 1 : file.num_samples;
  player = new AudioContext();
  const buffer = player.createBuffer(1, end - start, file.sample_rate);
  buffer.copyToChannel(Float32Array.from(file.samples.subarray(start, end), (sample) => sample / 32768), 0);
  const source = new AudioBufferSourceNode(player, { buffer });
  source.connect(player.destination);
  source.onended = stop;
  source.start();
  playButton.textContent = "Stop";
  const own = player;
  const advance = () => {
    if (player !== own) return;
    const sample = start + own.currentTime * file.sample_rate;
    put(playhead, sample, sample);
    requestAnimationFrame(advance);
  };
  advance();
}

playButton.addEventListener("click", play);
element.querySelector(".in").addEventListener("click", () => zoom(0.5));
element.querySelector(".out").addEventListener("click", () => zoom(2));
element.querySelector(".whole").addEventListener("click", () => look(0, book.file.num_samples));
for (const event of ["pointerdown", "pointermove"]) overview.addEventListener(event, scrollTo);
stage.addEventListener("keydown", (event) => {
  const act = { "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), " ": play }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});
pointer(canvas, at);
arrowKeys(stage, () => {
  const step = book.file.bytes_per_sample;
  const page = step * Math.ceil((view.to - view.from) / 50);
  return { ArrowLeft: -step, ArrowRight: step, PageUp: -page, PageDown: page, Home: -book.file.count, End: book.file.count };
});
new ResizeObserver(() => element.hidden || paint()).observe(stage);
book.on("document", stop);
follow(element, ["audio"], { show, paint, mark, reveal });
