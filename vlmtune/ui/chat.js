// The script of the chat page: it sends the image with each question, and shows answers as text nodes alone.
const token = new URLSearchParams(location.search).get("token");
const get = (id) => document.getElementById(id);
let image = null;
function show(file) {
  if (!file) return;
  image = file;
  if (get("shown").src) URL.revokeObjectURL(get("shown").src);
  get("shown").src = URL.createObjectURL(file); get("shown").hidden = false; get("shown").alt = file.name;
  get("hint").hidden = true; get("question").focus();
}
function add(question, answer, failed) {
  const turn = document.createElement("div"); turn.className = failed ? "turn failed" : "turn";
  for (const text of [question, answer]) { const p = document.createElement("p"); p.textContent = text; turn.append(p); }
  get("answers").prepend(turn);
}
get("image").addEventListener("change", (event) => show(event.target.files[0]));
const drop = get("drop");
drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => { event.preventDefault(); drop.classList.remove("over"); show(event.dataTransfer.files[0]); });
get("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = get("question").value.trim();
  if (!question) return;
  if (!image) { add(question, "Choose an image first.", true); return; }
  const form = new FormData(); form.append("image", image, image.name); form.append("question", question);
  get("send").disabled = true; get("send").textContent = "…";
  try {
    const answer = await fetch("api/ask", {method: "POST", headers: {"X-Token": token}, body: form});
    const type = answer.headers.get("Content-Type") || "";
    const data = type.includes("json") ? await answer.json() : {error: await answer.text()};
    add(question, data.answer ?? data.error, !answer.ok);
  } catch { add(question, "The server does not answer: it was ended.", true); }
  get("send").disabled = false; get("send").textContent = "Ask"; get("question").select();
});
