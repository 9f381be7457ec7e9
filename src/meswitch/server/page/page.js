// The page of meswitch: talks to the API that every client has, and to nothing else.
"use strict";

const $ = (id) => document.getElementById(id);
const ROOT = document.querySelector("meta[name=root]").content;
const LOOK_MS = 1000;
const SPARK = 120;  // looks that the curve shows

const columns = [[], []];  // each side's conversation
let running = null;  // what Stop aborts
let last = null;  // (time, tokens) of the look before
const rates = [];

function made(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}

// --- asking -------------------------------------------------------------------------------------------------------

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = {"Content-Type": "application/json", ...(key ? {Authorization: `Bearer ${key}`} : {})};
  const answer = await fetch(ROOT + path, {...options, headers});
  if (answer.status === 401) {
    await askForKey(Boolean(key));
    return ask(path, options);
  }
  return answer;
}

let asking = null;
function askForKey(wasWrong) {
  asking ??= new Promise((resolve) => {
    if (wasWrong) $("key-why").textContent = "That key is not known here. Try another one.";
    $("key").showModal();
    $("key").onclose = () => {
      sessionStorage.setItem("key", $("key-text").value.trim());
      asking = null;
      resolve();
    };
  });
  return asking;
}

async function* events(answer) {
  const decoder = new TextDecoder();
  let text = "";
  const reader = answer.body.getReader();
  for (;;) {
    const {done, value} = await reader.read();
    text += decoder.decode(value ?? new Uint8Array(), {stream: !done});
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
    if (done) return;
  }
}

async function answerIn(card, model, messages, signal) {
  const text = card.querySelector(".text");
  const began = performance.now();
  let said = "", tokens = 0, first = null, failed = null;
  try {
    const answer = await ask("/v1/chat/completions", {
      method: "POST",
      signal,
      body: JSON.stringify({
        model, messages, stream: true, stream_options: {include_usage: true},
        max_tokens: Number($("tokens").value) || 256, temperature: Number($("temperature").value) || 0,
      }),
    });
    if (!answer.ok) {
      const problem = await answer.json().catch(() => null);
      throw new Error(problem?.error?.message ?? `the server answered with status ${answer.status}`);
    }
    const expert = decodeURIComponent(answer.headers.get("x-meswitch-expert") ?? model);
    card.querySelector(".who").textContent = expert;
    drawScores(card, expert, answer.headers);
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      const piece = event.choices?.[0]?.delta?.content;
      if (piece) {
        first ??= performance.now();
        said += piece;
        text.textContent = said;
        follow();
      }
    }
  } catch (error) {
    failed = error.name === "AbortError" ? "stopped" : error.message;
    card.append(made("p", "error", failed));
  }
  const seconds = (performance.now() - began) / 1000;
  const shown = [`${seconds.toFixed(2)} s`];
  if (first !== null) shown.unshift(`first token ${((first - began) / 1000).toFixed(2)} s`);
  if (tokens) shown.unshift(`${tokens} tokens`);
  card.querySelector(".cost").textContent = shown.join(", ");
  return failed === null || said ? said : null;
}

function drawScores(card, expert, headers) {
  const told = headers.get("x-meswitch-route-scores");
  const reason = headers.get("x-meswitch-route-reason");
  if (reason) card.querySelector(".why").textContent = `auto: ${reason}`;
  if (!told) return;
  const scores = made("div", "scores");
  scores.setAttribute("role", "img");
  scores.setAttribute("aria-label", `The router's scores: ${told.replaceAll(",", ", ")}`);
  for (const pair of told.split(",")) {
    const cut = pair.lastIndexOf("=");
    const name = decodeURIComponent(pair.slice(0, cut)), score = Number(pair.slice(cut + 1));
    const bar = made("div", name === expert ? "bar chosen" : "bar");
    bar.append(made("i"));
    bar.firstChild.style.width = `${score * 100}%`;
    scores.append(made("span", "name", name), bar, made("span", "value", `${(score * 100).toFixed(1)} %`));
  }
  card.append(scores);
}

function follow() {
  const log = $("log");
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

async function send() {
  const question = $("question").value.trim();
  if (!question || running) return;
  $("question").value = "";
  $("hint").hidden = true;
  const turn = made("div", "turn"), cards = made("div", "answers");
  turn.append(made("div", "user", question), cards);
  $("log").append(turn);
  $("log").scrollTop = $("log").scrollHeight;
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  const models = [$("left").value, ...($("both").checked ? [$("right").value] : [])];
  await Promise.all(models.map(async (model, side) => {
    const card = made("article", "answer"), head = made("header");
    head.append(made("span", "who", model), made("span", "why"), made("span", "cost"));
    card.append(head, made("div", "text"));
    cards.append(card);
    const messages = [...columns[side], {role: "user", content: question}];
    const said = await answerIn(card, model, messages, running.signal);
    if (said !== null) columns[side] = [...messages, {role: "assistant", content: said}];
  }));
  running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  $("question").focus();
}

// --- looking ------------------------------------------------------------------------------------------------------

function bytes(n) {
  for (const [size, unit] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (n >= size) return `${(n / size).toFixed(n / size < 10 ? 1 : 0)} ${unit}`;
  }
  return `${n} B`;
}

async function listModels() {
  const answer = await ask("/v1/models");
  const cards = answer.ok ? (await answer.json()).data : [];
  cards.sort((a, b) => (a.kind === "router" ? 0 : 1) - (b.kind === "router" ? 0 : 1));
  const names = cards.map((card) => card.id).join("\n");
  if ($("left").dataset.names === names) return;
  for (const id of ["left", "right"]) {
    const before = $(id).value;
    $(id).replaceChildren(...cards.map((card) => {
      const option = made("option", "", card.id);
      option.value = card.id;
      option.title = card.description;
      return option;
    }));
    if (cards.some((card) => card.id === before)) $(id).value = before;
    else if (id === "right") $(id).selectedIndex = Math.min(1, cards.length - 1);
  }
  $("left").dataset.names = names;
}

function tier(name, used, total, text) {
  const row = made("div", "tier"), bar = made("div", "bar chosen");
  bar.append(made("i"));
  bar.firstChild.style.width = `${total ? Math.min(100, (used / total) * 100) : 0}%`;
  row.append(made("span", "", name), bar, made("span", "", text));
  return row;
}

function show(experts, state) {
  const now = performance.now();
  if (last !== null && now > last[0]) {
    const rate = Math.max(0, (state.generated_tokens - last[1]) / ((now - last[0]) / 1000));
    rates.push(rate);
    if (rates.length > SPARK) rates.shift();
    $("rate").textContent = rate < 10 ? rate.toFixed(1) : Math.round(rate);
    const top = Math.max(...rates, 1);
    const points = rates.map((one, at) => `${(at / (SPARK - 1)) * 240},${46 - (one / top) * 44}`);
    $("spark").firstElementChild.setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
  }
  last = [now, state.generated_tokens];
  const memory = state.memory, device = state.device_bytes;
  $("load").textContent = `${state.running} running, ${state.waiting} waiting, ${bytes(device)} on the device`;
  const taken = experts.filter((one) => one.slot !== null).length;
  $("memory").replaceChildren(
    tier("base", memory.base, device, bytes(memory.base)),
    tier("slots", taken, state.slots, `${taken} of ${state.slots}, ${bytes(memory.slots)}`),
    tier("KV cache", state.kv_used_tokens, state.kv_tokens, `${state.kv_used_tokens} of ${state.kv_tokens} tokens`),
    ...["merged", "graphs", "scratch"].filter((purpose) => purpose === "merged" || memory[purpose]).map(
      (purpose) => tier(purpose, memory[purpose], device, bytes(memory[purpose]))),
    tier("host", memory.host, state.host_budget ?? memory.host * 2, bytes(memory.host)),
  );
  $("experts").tBodies[0].replaceChildren(...experts.map((one) => {
    const row = made("tr");
    row.title = one.description;
    row.append(
      made("td", "", one.pinned ? `${one.id} (pinned)` : one.id), made("td", one.place, one.place),
      made("td", "", bytes(one.bytes)), made("td", "", one.requests), made("td", "", one.hits),
    );
    return row;
  }));
}

async function look() {
  let state = "failed", text = "no answer from the server";
  try {
    const health = await (await fetch(`${ROOT}/health`)).json();
    state = health.status === "ok" ? "ok" : "failed";
    text = health.reason ?? "ready";
    await listModels();
    const answer = await ask("/v1/experts");
    $("side").hidden = !answer.ok;  // a server whose experts nobody changes has no such list
    if (answer.ok) {
      const found = await answer.json();
      show(found.data, found.engine);
      text = `${text}, ${found.data.length} experts of ${found.engine.base}`;
    }
  } catch (error) {
    console.warn(error);
  }
  $("state").className = state;
  $("state-text").textContent = text;
  setTimeout(look, document.visibilityState === "visible" ? LOOK_MS : 10 * LOOK_MS);
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("stop").addEventListener("click", () => running?.abort());
$("both").addEventListener("change", () => { $("right").disabled = !$("both").checked; });
$("choose").addEventListener("submit", (event) => event.preventDefault());
$("clear").addEventListener("click", () => {
  running?.abort();
  columns[0] = [];
  columns[1] = [];
  $("log").querySelectorAll(".turn").forEach((turn) => turn.remove());
  $("hint").hidden = false;
  $("question").focus();
});
look();
