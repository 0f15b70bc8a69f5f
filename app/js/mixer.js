// One row for each concept of the blend: a chip that takes it out, a slider, a number.
// The component's value changes here at once, so that Draw never sees an older weight; the written blend follows.
// Every move has a number. An answer tells how many moves the server had seen: later ones stay, and are sent again.
const list = element.querySelector("ul");
const empty = element.querySelector(".empty");
let due = null;
let clock = 0;
const moves = new Map(); // of each row that was moved: the move's number and the weight
function send() {
  clearTimeout(due);
  due = setTimeout(() => trigger("input", {}), 40);
}
function put(which) {
  const rows = props.value.rows.map((row) => (which(row) ? { ...row, weight: moves.get(row.id).weight } : row));
  props.value = { ...props.value, clock, rows };
  send();
}
function change(id, weight) {
  clock += 1;
  moves.set(id, { clock, weight });
  put((row) => row.id === id);
}
function arrive() {
  const seen = props.value.clock ?? clock;
  const late = (row) => moves.get(row.id)?.clock > seen;
  if (props.value.rows.some(late)) put(late);
  draw();
}
function field(type, row) {
  const input = document.createElement("input");
  input.type = type;
  input.step = 0.05;
  if (type === "range") {
    input.min = -2;
    input.max = 2;
  }
  input.value = row.weight;
  input.setAttribute("aria-label", `${type === "range" ? "Slider" : "Number"}: weight of ${row.name}`);
  return input;
}
function entry(row) {
  const item = document.createElement("li");
  item.dataset.id = row.id;
  const chip = document.createElement("button");
  chip.type = "button";
  chip.className = "chip";
  chip.setAttribute("aria-label", `Take ${row.name} out`);
  const name = document.createElement("span");
  name.textContent = row.name;
  const cross = document.createElement("span");
  cross.textContent = "×";
  cross.setAttribute("aria-hidden", "true");
  chip.append(name, cross);
  chip.title = `Take ${row.name} out of blend and prompt`;
  chip.addEventListener("click", () => trigger("delete", { name: row.name }));
  const slider = field("range", row);
  const exact = field("number", row);
  slider.addEventListener("input", () => {
    exact.value = slider.value;
    change(row.id, Number(slider.value));
  });
  slider.addEventListener("dblclick", () => {
    slider.value = exact.value = 1;
    change(row.id, 1);
  });
  exact.addEventListener("input", () => {
    if (exact.value === "" || !Number.isFinite(Number(exact.value))) return;
    slider.value = exact.value;
    change(row.id, Number(exact.value));
  });
  item.append(chip, slider, exact);
  tell(item, row.note);
  return item;
}
function tell(item, text) {
  let note = item.querySelector(".note");
  if (!text) {
    if (note) note.remove();
    return;
  }
  if (!note) {
    note = document.createElement("span");
    note.className = "note";
    item.append(note);
  }
  note.textContent = text;
}
function update(item, row) {
  tell(item, row.note);
  for (const input of item.querySelectorAll("input")) {
    if (input !== document.activeElement) input.value = row.weight;
  }
}
function draw() {
  const rows = props.value.rows;
  const present = [...list.children];
  if (present.length === rows.length && rows.every((row, index) => present[index].dataset.id === row.id)) {
    rows.forEach((row, index) => update(present[index], row));
  } else {
    list.replaceChildren(...rows.map(entry));
  }
  list.hidden = rows.length === 0;
  empty.hidden = rows.length > 0;
}
watch("value", arrive);
draw();
