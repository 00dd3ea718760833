const rows = [...document.querySelectorAll("article")];
const kind = document.querySelector("#kind"), words = document.querySelector("#words");
const count = document.querySelector("#count");
function choose() {
  const wanted = kind.value, said = words.value.trim().toLowerCase();
  let shown = 0;
  for (const row of rows) {
    const kinds = row.dataset.problems.split(" ");
    const fits = (!wanted || kinds.includes(wanted) || (wanted === "*" && kinds[0])) && row.dataset.words.includes(said);
    row.hidden = !fits;
    shown += fits ? 1 : 0;
  }
  count.textContent = `${shown} of ${rows.length} rows`;
}
kind.addEventListener("input", choose);
words.addEventListener("input", choose);
for (const button of document.querySelectorAll("button[data-kind]")) {
  button.addEventListener("click", () => {
    kind.value = button.dataset.kind;
    choose();
    document.querySelector("#rows").scrollIntoView();
  });
}
const given = new URLSearchParams(location.hash.slice(1));  // page.html#kind=cut&words=peru
kind.value = given.get("kind") ?? "";
words.value = given.get("words") ?? "";
choose();
