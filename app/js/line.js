// Text only: lines of a string, as text nodes.
const paragraph = element.querySelector("p");
function draw() {
  paragraph.textContent = props.value ?? "";
}
watch("value", draw);
draw();
