// A table of text cells; a row's first cell is its heading.
const sheet = element.querySelector("table");
function cells(texts, tag, scope) {
  const row = document.createElement("tr");
  texts.forEach((text, index) => {
    const cell = document.createElement(index === 0 || tag === "th" ? "th" : "td");
    if (cell.tagName === "TH") cell.scope = tag === "th" ? "col" : scope;
    cell.textContent = text;
    row.append(cell);
  });
  return row;
}
function draw() {
  const value = props.value ?? { head: [], rows: [] };
  const head = document.createElement("thead");
  if (value.head.length) head.append(cells(value.head, "th", "col"));
  const body = document.createElement("tbody");
  value.rows.forEach((row) => body.append(cells(row, "td", "row")));
  sheet.replaceChildren(head, body);
  element.classList.toggle("bare", value.rows.length === 0);
}
watch("value", draw);
draw();
