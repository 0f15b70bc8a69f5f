// Text only: lines of a string, as text nodes.
const paragraph = element.querySelector("p");
function draw() {
  paragraph.textContent = props.value ?? "";
  paragraph.classList.toggle("pointed", paragraph.textContent.includes("\n")); // a mark stands under a character
}
watch("value", draw);
draw();
