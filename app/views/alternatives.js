// The likeliest bytes at one place of a sample, as buttons that start a branch.
const root = element.querySelector("section");
const list = root.querySelector(".choices");

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
}

function button(value, choice) {
  const node = document.createElement("button");
  node.type = "button";
  node.className = choice.value === value.stands ? "choice stands" : "choice";
  const percent = 100 * choice.probability;
  const fill = document.createElement("span");
  fill.className = "fill";
  fill.style.width = `${percent}%`;
  const label = document.createElement("strong");
  label.textContent = choice.label;
  const share = document.createElement("span");
  share.textContent = `${percent < 0.1 ? "under 0.1" : percent.toFixed(1)}%${choice.value === value.stands ? ", stands here" : ""}`;
  node.append(fill, label, share);
  node.addEventListener("click", () => trigger("branch", { id: value.id, number: value.number, value: choice.value }));
  return node;
}

for (const step of root.querySelectorAll("[data-step]")) {
  step.addEventListener("click", () => trigger("step", { id: props.value.id, number: props.value.number + Number(step.dataset.step) }));
}
watch("value", draw);
draw();
