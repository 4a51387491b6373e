// What the page says where there is no result to show: nothing yet, work that goes on, or what went wrong.
const root = element.querySelector("section");

function draw() {
  const { state, title, text, done } = props.value;
  element.dataset.state = state;
  root.hidden = state === "done";
  if (root.hidden) return root.replaceChildren();
  const box = bytes.make("div", `message ${state}`);
  if (state === "working") box.append(bytes.make("span", "turning"));
  box.append(bytes.make("strong", "", title), bytes.make("p", "", text));
  if (done) {
    box.append(bytes.make("div", "done"));
    box.lastElementChild.style.width = `${done * 100}%`;
  }
  root.replaceChildren(box);
}

watch("value", draw);
draw();
