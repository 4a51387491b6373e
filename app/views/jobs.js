// The jobs of this browser: what each is, how it stands, and buttons to open and to stop it.
// To open a job is to make it this tab's own and to load the page again, which takes it up where it is.
const { make } = bytes;
const root = element.querySelector("section");

function open(job) {
  sessionStorage.setItem(`megabyte-${job.kind}`, job.id);
  sessionStorage.setItem("megabyte-tab", job.kind);
  location.reload();
}

function button(text, label, act) {
  const node = make("button", "", text);
  node.type = "button";
  node.setAttribute("aria-label", label);
  node.addEventListener("click", act);
  return node;
}

function makeRow(job) {
  const row = make("tr", job.state);
  const [state, kind, title, time, actions] = ["state", "kind", "source", "time", "actions"].map((name) => row.appendChild(make("td", name)));
  state.append(make("span", "mark"), make("span", "word"));
  kind.textContent = job.tab;
  title.textContent = job.title;
  actions.append(button("Show", `Show ${job.title}`, () => open(job)));
  if (job.state === "running") actions.append(button("Stop", `Stop ${job.title}`, () => trigger("stop", { id: job.id })));
  row.update = (news) => {
    state.lastElementChild.textContent = news.problem || news.state;
    time.textContent = news.time;
    row.style.setProperty("--done", "50%");
  };
  return row;
}

function makeTable() {
  const scroller = make("div", "scroller");
  const table = make("table");
  const head = table.createTHead().insertRow();
  for (const name of ["State", "Tab", "What", "Time", "Actions"]) {
    const cell = make("th", name.toLowerCase(), name);
    cell.scope = "col";
    head.append(cell);
  }
  table.append(make("tbody"));
  scroller.append(table);
  return scroller;
}

let rows = new Map();

function draw() {
  const { jobs, title, text, note } = props.value;
  if (!jobs.length) {
    const box = make("div", "message");
    box.append(make("strong", "", title), make("p", "", text));
    root.replaceChildren(box, make("p", "note", note));
    rows = new Map();
    return;
  }
  if (!root.querySelector("table")) root.replaceChildren(makeTable(), make("p", "note", note));
  const before = rows;
  // A row is made anew when its state changes, and otherwise kept, so that a button does not vanish under a finger.
  rows = new Map(jobs.map((job) => [`${job.id} ${job.state}`, before.get(`${job.id} ${job.state}`) ?? makeRow(job)]));
  jobs.forEach((job) => rows.get(`${job.id} ${job.state}`).update(job));
  const body = root.querySelector("tbody");
  if ([...rows.values()].some((row, index) => body.children[index] !== row) || body.children.length !== rows.size) {
    body.replaceChildren(...rows.values());
  }
}

watch("value", draw);
draw();
