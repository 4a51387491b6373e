// The waveform, as high as its peak, each column in the colour of its mean bits, over a strip of the same colours.
const stage = element.querySelector(".stage");
const canvas = element.querySelector("canvas");
const button = element.querySelector("button");
const HEIGHT = 190; // CSS pixels
const STRIP = 20;
let file = null;
let peak = 1;
let cursor = -1;
let player = null;

function show(document) {
  stop();
  file = document;
  peak = file.samples.reduce((highest, sample) => Math.max(highest, Math.abs(sample)), 1);
  cursor = -1;
  draw();
}

function draw() {
  const width = stage.clientWidth;
  if (!file || !width) return;
  const context = bytes.fit(canvas, width, HEIGHT);
  const middle = (HEIGHT - STRIP - 8) / 2;
  context.fillStyle = bytes.colours(element).faint;
  context.fillRect(0, middle, width, 0.5);
  for (let x = 0; x < width; x++) {
    const start = Math.floor((x / width) * file.num_samples);
    const end = Math.max(start + 1, Math.floor(((x + 1) / width) * file.num_samples));
    let low = 32767;
    let high = -32768;
    for (let i = start; i < end; i++) {
      low = Math.min(low, file.samples[i]);
      high = Math.max(high, file.samples[i]);
    }
    const { mean } = file.span(start * file.bytes_per_sample, end * file.bytes_per_sample);
    context.fillStyle = bytes.css[bytes.level(mean)];
    const top = middle - (high / peak) * middle;
    context.fillRect(x, top, 1, Math.max(1.5, ((high - low) / peak) * middle));
    context.fillRect(x, HEIGHT - STRIP, 1, STRIP);
  }
  context.fillStyle = bytes.colours(element).faint;
  context.textAlign = "right";
  context.fillText(`peak ${((100 * peak) / 32768).toFixed(0)}% of full scale`, width - 4, 10);
  if (cursor >= 0) {
    bytes.frame(context, (sampleOf(cursor) / file.num_samples) * width - 2, 0, 4, HEIGHT);
  }
}

const sampleOf = (offset) => Math.floor(offset / file.bytes_per_sample);

function at(event) {
  const box = canvas.getBoundingClientRect();
  const sample = Math.floor(((event.clientX - box.left) / box.width) * file.num_samples);
  return sample >= 0 && sample < file.num_samples ? sample * file.bytes_per_sample : -1;
}

function mark(offset) {
  if (!file || offset >= file.count) return;
  cursor = offset;
  draw();
}

function stop() {
  player?.close();
  player = null;
  button.textContent = "Play";
}

function play() {
  if (player) return stop();
  player = new AudioContext();
  const start = Math.max(0, cursor < 0 ? 0 : sampleOf(cursor));
  const buffer = player.createBuffer(1, file.num_samples - start, file.sample_rate);
  buffer.copyToChannel(Float32Array.from(file.samples.subarray(start), (sample) => sample / 32768), 0);
  const source = new AudioBufferSourceNode(player, { buffer });
  source.connect(player.destination);
  source.onended = stop;
  source.start();
  button.textContent = "Stop";
}

button.addEventListener("click", play);
bytes.pointer(canvas, at, (offset) => file.describe(offset).replaceAll("  ·  ", "\n"));
bytes.onCursor(mark);
bytes.arrowKeys(stage, () => {
  const step = file.bytes_per_sample;
  const page = step * Math.ceil(file.num_samples / 100);
  return { ArrowLeft: -step, ArrowRight: step, PageUp: -page, PageDown: page };
}, () => cursor, () => file.count);
new ResizeObserver(draw).observe(stage);
bytes.follow(element, props, watch, ["audio"], show);
