() => {
  // Gradio names its empty pictures without giving them a role, which screen readers pass over; they get one as they appear.
  const mend = () => {
    for (const one of document.querySelectorAll("div.empty[aria-label]:not([role])")) one.setAttribute("role", "img");
  };
  new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
  mend();
}
