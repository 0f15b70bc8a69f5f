// A line of text that is read out, with a bar while something is under way.
const text = element.querySelector("p");
const bar = element.querySelector("progress");
function draw() {
  const now = props.value ?? {};
  text.textContent = now.text ?? "";
  text.classList.toggle("pointed", text.textContent.includes("\n")); // a mark stands under a character
  bar.hidden = !now.of;
  if (now.of) {
    bar.max = now.of;
    bar.value = now.done ?? 0;
  }
}
watch("value", draw);
draw();
