"use strict";
const sheet = JSON.parse(document.getElementById("sheet").textContent);
const pairs = sheet.pairs;
const store = "gadcore sheet " + sheet.id;
const $ = (id) => document.getElementById(id);
const SAID = { left: "A is better", right: "B is better", tie: "Tie" };

// answers: {pair id: {choice, seconds}}. A pair that is answered again replaces its answer and adds to its seconds.
let state = { rater: "", answers: {} };
let at = 0;
let shownAt = 0;
let exported = true;
let unsafe = false;

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(store));
    if (kept) state = kept;
  } catch {
    warn();
  }
}

function save() {
  exported = false;
  try {
    localStorage.setItem(store, JSON.stringify(state));
  } catch {
    warn();
  }
}

function warn() {
  $("trouble").textContent = "This browser keeps nothing for this page: export your choices before you close it.";
  $("trouble").hidden = false;
  unsafe = true;
}

const answered = () => pairs.filter((pair) => pair.id in state.answers).length;

function view(name, heading) {
  for (const id of ["start", "pair", "done"]) $(id).hidden = id !== name;
  $("where").hidden = name === "start";
  $("actions").hidden = name !== "pair";
  $("bar").max = pairs.length;
  $("bar").value = answered();
  $("count").textContent = `${answered()} of ${pairs.length} answered`;
  scrollTo(0, 0);
  $(heading).focus({ preventScroll: true });
}

function text(node, content) {
  node.textContent = content || "(empty)";
  node.classList.toggle("empty", !content);
}

function show() {
  const pair = pairs[at];
  const answer = state.answers[pair.id];
  $("asked").textContent = `Prompt ${at + 1} of ${pairs.length}`;
  $("messages").replaceChildren(...pair.messages.map((message, i) => {
    const box = document.createElement("div");
    const last = i === pair.messages.length - 1;
    box.className = last ? "message" : "message earlier";
    if (pair.messages.length > 1) {
      const role = document.createElement("div");
      role.className = "role";
      role.textContent = message.role;
      box.append(role);
    }
    const body = document.createElement("div");
    body.className = "text";
    text(body, message.content);
    box.append(body);
    return box;
  }));
  for (const side of ["left", "right"]) {
    text($(side).querySelector(".text"), pair[side]);
    $(side).classList.toggle("chosen", answer?.choice === side);
  }
  for (const button of document.querySelectorAll("[data-choice]")) {
    button.setAttribute("aria-pressed", String(answer?.choice === button.dataset.choice));
  }
  $("back").disabled = at === 0;
  view("pair", "asked");
  // A text that scrolls has to be reachable by keyboard.
  for (const node of document.querySelectorAll(".prompt .text")) {
    if (node.scrollHeight > node.clientHeight) node.tabIndex = 0;
  }
  shownAt = performance.now();
}

function next() {
  const open = pairs.findIndex((pair) => !(pair.id in state.answers));
  if (open >= 0) {
    at = open;
    return show();
  }
  const count = (choice) => Object.values(state.answers).filter((answer) => answer.choice === choice).length;
  $("sum").textContent = `A ${count("left")}, tie ${count("tie")}, B ${count("right")}.`;
  view("done", "thanks");
}

function choose(choice) {
  const id = pairs[at].id;
  const seconds = (state.answers[id]?.seconds ?? 0) + (performance.now() - shownAt) / 1000;
  state.answers[id] = { choice, seconds: Math.round(seconds * 10) / 10 };
  save();
  $("said").textContent = `Prompt ${at + 1}: ${SAID[choice]}. ${answered()} of ${pairs.length} answered.`;
  next();
}

function back() {
  if (!$("done").hidden) at = pairs.length;
  if (at === 0) return;
  at -= 1;
  $("said").textContent = `Back to prompt ${at + 1}.`;
  show();
}

function download() {
  const answers = pairs.filter((pair) => pair.id in state.answers)
    .map((pair) => ({ pair: pair.id, ...state.answers[pair.id] }));
  const content = JSON.stringify({ sheet: sheet.id, rater: state.rater, pairs: pairs.length, answers }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content + "\n"], { type: "application/json" }));
  link.download = `answers-${sheet.id}-${state.rater.replace(/[^\p{L}\p{N}]+/gu, "-")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  exported = true;
  $("said").textContent = `Exported ${answers.length} of ${pairs.length} choices.`;
}

const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" };
addEventListener("keydown", (event) => {
  if (!$("start").hidden || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  const choice = $("pair").hidden ? undefined : KEYS[event.key];
  if (!choice && event.key !== "Backspace") return;
  event.preventDefault();
  // A key held down would answer one pair after another, unread.
  if (event.repeat) return;
  if (choice) choose(choice); else back();
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => choose(button.dataset.choice));
}
$("back").addEventListener("click", back);
$("reopen").addEventListener("click", back);
$("export").addEventListener("click", download);
$("finish").addEventListener("click", download);
$("begin").addEventListener("submit", (event) => {
  event.preventDefault();
  state.rater = $("rater").value.trim();
  if (!state.rater) return $("rater").focus();
  save();
  next();
});
addEventListener("beforeunload", (event) => {
  if (unsafe && !exported) event.preventDefault();
});

load();
$("total").textContent = pairs.length === 1 ? "one prompt" : `${pairs.length} prompts`;
$("rater").value = state.rater;
if (answered()) {
  $("hello").textContent = answered() === pairs.length ? "Welcome back" : `Welcome back: ${answered()} of ${pairs.length} answered`;
  $("go").textContent = "Go on";
}
view("start", "hello");
