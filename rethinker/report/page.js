// The browser of completions: which responses are shown, and how many questions at a time. Without it all are shown.
"use strict";
window.addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details.fold")) fold.open = true;
});
(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const PAGE = 12;
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const groups = [...document.querySelectorAll("details.group")].map((element) => ({
    element,
    question: element.querySelector(".question").textContent.toLowerCase(),
    responses: [...element.querySelectorAll("li.response")].map((item) => ({
      item,
      text: item.querySelector(".text").textContent.toLowerCase(),
    })),
  }));
  let limit = PAGE;

  const fits = (item, verdict) =>
    verdict === "all" || (verdict === "rethought" ? item.dataset.rethought === "yes" : item.dataset.verdict === verdict);

  function show() {
    const wanted = Object.fromEntries(new FormData(form));
    const text = wanted.text.trim().toLowerCase();
    const narrowed = wanted.verdict !== "all" || text !== "";
    let questions = 0;
    let responses = 0;
    for (const { element, question, responses: all } of groups) {
      const here = (!wanted.run || element.dataset.run === wanted.run) &&
        (!wanted.category || element.dataset.category === wanted.category);
      const inQuestion = question.includes(text);
      let kept = 0;
      for (const response of all) {
        const keep = here && fits(response.item, wanted.verdict) && (inQuestion || response.text.includes(text));
        response.item.hidden = !keep;
        kept += keep;
      }
      const found = kept > 0 || (here && all.length === 0 && !narrowed);
      element.hidden = !found || questions >= limit;
      if (found && narrowed) element.open = true;
      questions += found;
      responses += kept;
    }
    const shown = Math.min(questions, limit);
    const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
    count.textContent = `${counted(responses, "response")} of ${counted(questions, "question")}` + (shown < questions ? `, ${shown} shown` : "");
    more.hidden = shown >= questions;
  }

  form.addEventListener("input", () => { limit = PAGE; show(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  more.querySelector("button").addEventListener("click", () => { limit += PAGE; show(); });
  form.reset(); // a reloaded page keeps no filter that its responses do not show
  form.hidden = false;
  show();
})();
