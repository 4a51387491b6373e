// What the colours mean: measure, palette and scale to choose from, the legend, the file compared with, and the exports.
const segments = element.querySelector("fieldset");
const [palette, range, other] = ["palette", "range", "other"].map((name) => element.querySelector(`select.${name}`));
const line = element.querySelector(".line");
const scale = element.querySelector(".scale");
const EXPORTS = { png: "PNG", csv: "CSV", npz: "NPZ", html: "Web page" };

for (const [name, measure] of Object.entries(MEASURES)) {
  const label = bytes.make("label", name);
  const radio = Object.assign(bytes.make("input"), { type: "radio", name: "byte-measure", value: name, checked: name === book.options.measure });
  radio.addEventListener("change", () => book.set({ measure: name }));
  label.append(radio, bytes.make("span", "", measure.name));
  segments.append(label);
}

const exports = element.querySelector(".exports");
for (const [form, name] of Object.entries(EXPORTS)) {
  const button = Object.assign(bytes.make("button", "", name), { type: "button" });
  button.dataset.form = form;
  button.addEventListener("click", () => trigger("export", { id: book.file.id, other: book.otherId, form, measure: book.options.measure, palette: book.options.palette }));
  exports.append(button);
}
exports.hidden = Boolean(props.value?.is_offline);

function legend() {
  for (const button of exports.querySelectorAll("button")) button.disabled = !book.file;
  if (!book.shade) return;
  const { shade, options, other: against } = book;
  const { measure } = shade;
  scale.width = 256;
  scale.height = 1;
  const context = scale.getContext("2d");
  for (let level = 0; level < 256; level++) {
    context.fillStyle = shade.css[level];
    context.fillRect(level, 0, 1, 1);
  }
  const [low, high] = options.isAuto ? [shade.low, shade.high].map(measure.format) : measure.ends.map((end, i) => (measure.isSigned ? `${["−", "+"][i]}${shade.high} bits, ${end}` : end));
  element.querySelector(".legend .low").textContent = low;
  element.querySelector(".legend .high").textContent = high;
  scale.setAttribute("aria-label", `Colour scale from ${low} to ${high}`);
  for (const [name, level] of [["above", ABOVE], ["below", BELOW]]) element.querySelector(`.${name} i`).style.background = shade.css[level];
  element.querySelector(".below").hidden = !(measure.isSigned || options.isAuto);
  element.querySelector(".above").hidden = measure === MEASURES.rank || (measure === MEASURES.entropy && !options.isAuto);
  element.querySelector(".hatch").hidden = !book.file;
  line.textContent = measure.line;
  for (const radio of segments.querySelectorAll("input")) radio.checked = radio.value === options.measure;
  segments.querySelector("label.difference").hidden = !against;
}

/** The files that the open one can be compared with. */
function choices() {
  const comparable = book.item ? book.comparable() : [];
  const sameModel = comparable.every(({ model }) => model === book.item.model);
  const option = (value, text) => Object.assign(bytes.make("option", "", text), { value });
  other.replaceChildren(option("", "nothing"), ...comparable.map(({ id, name, model }) => option(id, sameModel ? name : `${name}, ${model}`)));
  other.value = book.otherId;
  element.querySelector(".against").hidden = !comparable.length;
}

palette.addEventListener("change", () => book.set({ palette: palette.value }));
range.addEventListener("change", () => book.set({ isAuto: range.value === "auto" }));
other.addEventListener("change", () => book.compare(other.value));
book.on("shade", legend);
book.on("document", () => {
  legend();
  choices();
});
book.on("items", choices);
