// The script of the page: it asks for the state every two seconds and draws it with text nodes alone.
const token = new URLSearchParams(location.search).get("token");
const get = (id) => document.getElementById(id);
const element = (name, text) => { const e = document.createElement(name); e.textContent = text ?? ""; return e; };
const short = (v) => typeof v === "number" ? String(Number(v.toPrecision(4))) : Array.isArray(v) ? v.join(",") : String(v ?? "");
async function send(path, data) {
  const answer = await fetch(path, {method: "POST", headers: {"Content-Type": "application/json", "X-Token": token},
    body: JSON.stringify(data)});
  get("said").textContent = (await answer.json()).said;
  refresh();
}
function draw(state, metric) {
  const svg = get("curves"); svg.textContent = "";
  const points = state.trials.flatMap((t) => t.curve);
  get("none").hidden = points.length > 0;
  svg.toggleAttribute("hidden", !points.length); svg.nextElementSibling.hidden = !points.length;
  if (!points.length) return;
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const [x1, y0, y1] = [Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const width = Math.max(280, svg.clientWidth); // so that texts keep their size on a phone
  svg.setAttribute("viewBox", `0 0 ${width} 260`);
  const log = y0 > 0 && y1 / y0 >= 20, scaled = (v) => log ? Math.log(v) : v;
  const x = (v) => 64 + (width - 74) * v / x1;
  const y = (v) => y1 > y0 ? 230 - 210 * (scaled(v) - scaled(y0)) / (scaled(y1) - scaled(y0)) : 125;
  const make = (name, values, text) => {
    const e = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [k, v] of Object.entries(values)) e.setAttribute(k, v);
    if (text !== undefined) e.textContent = text;
    svg.appendChild(e); return e;
  };
  for (const v of y1 > y0 ? [y0, log ? Math.sqrt(y0 * y1) : (y0 + y1) / 2, y1] : [y0]) {
    make("line", {x1: 64, x2: width - 10, y1: y(v), y2: y(v)});
    make("text", {x: 58, y: y(v) + 4, "text-anchor": "end"}, Number(v.toPrecision(3)));
  }
  make("text", {x: width - 10, y: 252, "text-anchor": "end"}, "step " + x1);
  for (const t of state.trials) {
    if (!t.curve.length) continue;
    const kind = t.number === state.best ? "best" : t.state === "RUNNING" ? "" : "ended";
    if (t.curve.length === 1) { // a line needs two points
      make("circle", {class: kind, cx: x(t.curve[0][0]), cy: y(t.curve[0][1]), r: 3});
      continue;
    }
    const path = make("path", {class: kind, d: t.curve.map((p, i) => (i ? "L" : "M") + x(p[0]) + " " + y(p[1])).join("")});
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = "trial " + t.number; path.appendChild(title);
  }
}
function list(state, metrics) {
  const table = get("trials"); table.textContent = "";
  const head = table.insertRow();
  for (const name of ["trial", "state", ...state.names, "step", ...metrics, ""]) head.appendChild(element("th", name));
  for (const t of state.trials) {
    const row = table.insertRow(); row.className = t.number === state.best ? "best" : "";
    const mark = state.front.includes(t.number) ? " (front)" : "";
    for (const text of [t.number + mark, t.state, ...state.names.map((n) => short(t.values[n])),
      t.step === undefined ? "" : t.step + "/" + t.max_steps, ...metrics.map((m) => short(t[m]))])
      row.appendChild(element("td", text));
    const cell = row.appendChild(element("td"));
    if (t.state === "RUNNING" && state.running) {
      const button = cell.appendChild(element("button", "stop"));
      button.dataset.trial = t.trial_id;
      button.addEventListener("click", () => send("api/stop", {trial_id: t.trial_id}));
    }
  }
}
function answers(state, metric) {
  const found = state.answers ?? {}, trials = state.trials.filter((t) => found[t.number]), picked = get("trial");
  get("answered").hidden = !trials.length;
  if (!trials.length) return;
  const numbers = trials.map((t) => String(t.number)), sign = state.objectives[metric] === "min" ? 1 : -1;
  if (picked.dataset.numbers !== numbers.join()) { // a new list would close the open one
    const before = picked.value; picked.textContent = ""; picked.dataset.numbers = numbers.join();
    for (const n of ["", ...numbers]) picked.appendChild(element("option", n ? "trial " + n : "the best now")).value = n;
    picked.value = numbers.includes(before) ? before : "";
  }
  const value = (t) => t[metric] === undefined ? Infinity : sign * t[metric];
  const best = found[state.best] ? state.best : trials.reduce((a, b) => value(b) < value(a) ? b : a).number;
  const number = picked.value || best, table = get("answers"); table.textContent = "";
  get("whose").textContent = "Trial " + number;
  const head = table.insertRow();
  for (const name of ["question", "reference", ...found[number].map(([step]) => "step " + step)])
    head.appendChild(element("th", name));
  state.rows.forEach((row, place) => {
    const line = table.insertRow();
    for (const text of [row.question, row.reference]) line.appendChild(element("td", text));
    found[number].forEach(([, texts], i) => {
      const cell = line.appendChild(element("td", texts[place]));
      if (i && texts[place] !== found[number][i - 1][1][place]) cell.className = "changed";
    });
  });
}
function fields(state) {
  const form = get("form");
  get("propose").hidden = !state.running;
  if (form.children.length) return;
  for (const [name, entry] of Object.entries(state.drawn)) {
    const label = form.appendChild(element("label", entry.range ? name + ": " + entry.range : name));
    const input = label.appendChild(document.createElement(entry.choices ? "select" : "input")); input.name = name;
    for (const choice of entry.choices ?? []) input.appendChild(element("option", choice));
  }
  form.appendChild(element("button", "propose"));
  form.addEventListener("submit", (event) => { event.preventDefault();
    send("api/propose", Object.fromEntries(new FormData(form))); });
}
async function refresh() {
  const answer = await fetch("api/state", {headers: {"X-Token": token}});
  if (!answer.ok) { get("line").textContent = "the server does not answer"; return; }
  const state = await answer.json(), metrics = Object.keys(state.objectives);
  const ended = state.trials.filter((t) => !["RUNNING", "WAITING"].includes(t.state)).length;
  const best = state.trials.find((t) => t.number === state.best);
  get("line").textContent = `${ended}/${state.total} trials` + (best ? `, best ${short(best[metrics[0]])} (trial ${best.number})` : "")
    + (state.running ? ", running" : ", not running");
  get("folder").textContent = state.folder; get("metric").textContent = metrics[0] + " by step";
  get("waiting").textContent = state.waiting.length ? "Waiting: "
    + state.waiting.map((one) => Object.entries(one).map(([n, v]) => n + " " + short(v)).join(", ")).join("; ") : "";
  draw(state, metrics[0]); list(state, metrics); answers(state, metrics[0]); fields(state);
}
get("trial").addEventListener("change", refresh);
refresh(); setInterval(refresh, 2000);
