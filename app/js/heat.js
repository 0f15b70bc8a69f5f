// A matrix as a table whose cells are shaded by their value; the numbers stay readable text.
const sheet = element.querySelector("table");
function heading(text, scope) {
  const cell = document.createElement("th");
  cell.scope = scope;
  const inner = document.createElement("span");
  inner.textContent = text;
  cell.append(inner);
  return cell;
}
function draw() {
  const value = props.value ?? { columns: [], rows: [], values: [] };
  const top = document.createElement("tr");
  top.append(document.createElement("td"), ...value.columns.map((name) => heading(name, "col")));
  const head = document.createElement("thead");
  head.append(top);
  const body = document.createElement("tbody");
  value.rows.forEach((name, index) => {
    const row = document.createElement("tr");
    row.append(heading(name, "row"));
    value.values[index].forEach((number) => {
      const cell = document.createElement("td");
      if (number !== null) {
        const share = Math.min(1, Math.max(0, (number - value.low) / (value.high - value.low || 1)));
        cell.textContent = number.toFixed(value.digits);
        cell.style.setProperty("--share", `${Math.round(share * 100)}%`);
        cell.className = share > 0.55 ? "strong" : "weak";
      }
      row.append(cell);
    });
    body.append(row);
  });
  sheet.replaceChildren(...(value.rows.length ? [head, body] : []));
}
watch("value", draw);
draw();
