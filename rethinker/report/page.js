// The browser of completions: which questions and responses are shown. Without it all are.
"use strict";
(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const textOf = (element, selector) => element.querySelector(selector).textContent.toLowerCase();

  function show() {
    const wanted = Object.fromEntries(new FormData(form));
    const text = wanted.text.trim().toLowerCase();
    const narrowed = wanted.verdict !== "all" || text !== "";
    let questions = 0;
    let responses = 0;
    for (const group of document.querySelectorAll("details.group")) {
      const here = (!wanted.run || group.dataset.run === wanted.run) &&
        (!wanted.category || group.dataset.category === wanted.category);
      const asked = textOf(group, ".question").includes(text);
      let kept = 0;
      for (const item of group.querySelectorAll("li.response")) {
        const fits = wanted.verdict === "all" || item.dataset.verdict === wanted.verdict ||
          (wanted.verdict === "rethought" && item.dataset.rethought === "yes");
        const keep = here && fits && (asked || textOf(item, ".text").includes(text));
        item.hidden = !keep;
        kept += keep;
      }
      group.hidden = kept === 0;
      if (kept && narrowed) group.open = true;
      questions += kept > 0;
      responses += kept;
    }
    const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
    document.getElementById("count").textContent = `${counted(responses, "response")} of ${counted(questions, "question")}`;
  }

  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.reset(); // a reloaded page keeps no filter that its responses do not show
  form.hidden = false;
  show();
})();
