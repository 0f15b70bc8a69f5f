() => {
  // Three names in Gradio's own markup that screen readers stumble on: empty pictures are named without having a role, an
  // upload button's hidden name differs from the words on it, and the button around a shown picture has none at all.
  const mend = () => {
    for (const one of document.querySelectorAll("div.empty[aria-label]:not([role])")) one.setAttribute("role", "img");
    for (const one of document.querySelectorAll("button.upload-container[aria-label]")) {
      if (one.textContent.trim() !== "") one.removeAttribute("aria-label");
    }
    for (const one of document.querySelectorAll(".image-container > button:not([aria-label])")) {
      const label = one.closest(".block")?.querySelector("label")?.textContent.trim();
      one.setAttribute("aria-label", label || "Picture");
    }
  };
  new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
  mend();
}
