// The likeliest bytes at one place of a sample, as buttons that start a branch.
const root = element.querySelector("section");
const list = root.querySelector(".choices");
const place = root.querySelector("input");

function draw() {
  const value = props.value;
  root.hidden = !value?.choices;
  if (root.hidden) return;
  root.querySelector("h2").textContent = value.title;
  list.replaceChildren(...value.choices.map((choice) => button(value, choice)));
  for (const step of root.querySelectorAll("[data-step]")) {
    const number = value.number + Number(step.dataset.step);
    step.disabled = number < 0 || number > value.last;
  }
  place.value = value.number;
  place.max = value.last;
}

function go(number) {
  trigger("step", { id: props.value.id, number: Math.max(0, Math.min(props.value.last, number)) });
}

function button(value, choice) {
  const isHere = choice.value === value.stands;
  const percent = 100 * choice.probability;
  const node = Object.assign(bytes.make("button", isHere ? "choice stands" : "choice"), { type: "button" });
  const fill = bytes.make("span", "fill");
  fill.style.width = `${percent}%`;
  const share = `${percent < 0.1 ? "under 0.1" : percent.toFixed(1)}%${isHere ? ", stands here" : ""}`;
  node.append(fill, bytes.make("strong", "", choice.label), bytes.make("span", "", share));
  node.addEventListener("click", () => trigger("branch", { id: value.id, number: value.number, value: choice.value }));
  return node;
}

for (const step of root.querySelectorAll("[data-step]")) {
  step.addEventListener("click", () => go(props.value.number + Number(step.dataset.step)));
}
place.addEventListener("change", () => go(Math.round(Number(place.value))));
watch("value", draw);
draw();
