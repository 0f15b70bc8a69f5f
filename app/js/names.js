() => {
  // Two names in Gradio's own markup that screen readers stumble on: empty pictures are named without having a role, and an
  // upload button's hidden name differs from the words on it.
  const mend = () => {
    for (const one of document.querySelectorAll("div.empty[aria-label]:not([role])")) one.setAttribute("role", "img");
    for (const one of document.querySelectorAll("button.upload-container[aria-label]")) {
      if (one.textContent.trim() !== "") one.removeAttribute("aria-label");
    }
  };
  new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
  mend();
}
