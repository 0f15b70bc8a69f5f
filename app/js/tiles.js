// Picture buttons in a grid. Everything shown is a text node or a data address made by the page itself.
const list = element.querySelector("ul");
const empty = element.querySelector(".empty");
function tile(item) {
  const row = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.id = item.id;
  if ("on" in item) button.setAttribute("aria-pressed", item.on ? "true" : "false");
  if (item.hint) button.title = item.hint;
  const frame = document.createElement("span");
  frame.className = "frame";
  if (item.picture) {
    const picture = document.createElement("img");
    picture.src = item.picture;
    picture.alt = "";
    picture.loading = "lazy";
    frame.append(picture);
  } else {
    const letter = document.createElement("span");
    letter.className = "letter";
    letter.ariaHidden = "true";
    letter.textContent = [...item.title][0] ?? "";
    frame.append(letter);
  }
  if (item.badge) {
    const badge = document.createElement("span");
    badge.className = "badge";
    badge.textContent = item.badge;
    frame.append(badge);
  }
  const title = document.createElement("span");
  title.className = "title";
  title.textContent = item.title;
  const note = document.createElement("span");
  note.className = "note";
  note.textContent = item.note;
  button.append(frame, title, note);
  button.addEventListener("click", () => trigger("click", { id: item.id }));
  row.append(button);
  return row;
}
function draw() {
  const items = props.value?.tiles ?? [];
  const focused = element.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  list.replaceChildren(...items.map(tile));
  list.hidden = items.length === 0;
  empty.hidden = items.length > 0;
  if (props.value?.empty) empty.textContent = props.value.empty;
  if (focused) [...list.querySelectorAll("button")].find((button) => button.dataset.id === focused)?.focus();
}
watch("value", draw);
draw();
