// The chat page: one conversation at a time, streamed from the server's own OpenAI API. No library, no build.

const $ = (id) => document.getElementById(id);
let conversation = null; // {id, title, messages: [{role, content}]}
let user = null; // who is logged in
let running = null; // the AbortController of the answer that is being made
let asking = null; // settles when that answer has been kept

class Refusal extends Error {}

async function call(method, path, body, signal) {
  const headers = body === undefined ? {} : { "content-type": "application/json" };
  const answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  if (answer.ok) return answer;
  const error = (await answer.json().catch(() => ({}))).error;
  if (answer.status === 401 && path !== "/web/login") start(); // the session has ended, or its key was withdrawn
  throw new Refusal(error?.message ?? `The server answered ${answer.status}`);
}

async function start() {
  const session = await (await call("GET", "/web/session")).json();
  const locked = session.login_required && !session.user;
  $("login").hidden = !locked;
  $("app").hidden = locked;
  if (locked) return $("key").focus();
  if (user !== session.user) open(); // what another user left on the page is not for this one
  $("user").textContent = user = session.user;
  $("logout").hidden = !session.login_required;
  await Promise.all([showModels(), showHistory()]);
}

async function showModels() {
  const { data } = await (await call("GET", "/v1/models")).json();
  const chosen = $("model").value;
  $("model").replaceChildren(...data.map((model) => new Option(model.id, model.id, false, model.id === chosen)));
  $("send").disabled = data.length === 0;
  if (data.length === 0) setTimeout(awaitModels, 2000); // the model is still loading
}

const awaitModels = () => showModels().catch(() => setTimeout(awaitModels, 2000));

async function showHistory() {
  const { conversations } = await (await call("GET", "/web/conversations")).json();
  $("history").replaceChildren(...conversations.map((kept) => {
    const row = document.createElement("div");
    if (kept.id === conversation.id) row.setAttribute("aria-current", "true");
    const name = button(kept.title || "Untitled", () => {
      if (kept.id !== conversation.id) open(kept); // the one that is open may have more in it than was kept
    });
    const forget = button("×", async () => {
      if (kept.id === conversation.id) await stop(); // which keeps it, so that it is forgotten after that
      await call("DELETE", `/web/conversations/${kept.id}`);
      if (kept.id === conversation.id) open();
      await showHistory();
    });
    forget.className = "forget";
    forget.setAttribute("aria-label", `Delete ${kept.title}`);
    row.append(name, forget);
    return row;
  }));
}

function button(text, onclick) {
  const made = document.createElement("button");
  made.textContent = text;
  made.onclick = onclick;
  return made;
}

function stop() {
  running?.abort();
  return asking;
}

function open(kept) {
  stop();
  conversation = kept ?? { id: newId(), title: "", messages: [] };
  $("messages").replaceChildren(...conversation.messages.filter((m) => m.role !== "system").map(bubble));
  for (const row of $("history").children) row.removeAttribute("aria-current");
  $("prompt").focus();
}

// Not crypto.randomUUID, which browsers keep from pages that came over plain HTTP.
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

function bubble({ role, content }) {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = content; // text, never HTML: a model may write anything
  return item;
}

function note(where, text, isError = false) {
  if (where !== conversation) return; // another one is on the page by now
  const item = bubble({ role: isError ? "note error" : "note", content: text });
  $("messages").append(item);
  item.scrollIntoView({ block: "end" });
}

function parameters() {
  const asked = { model: $("model").value };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"])
    if ($(name).value !== "") asked[name] = Number($(name).value);
  return asked;
}

async function ask(text) {
  const mine = conversation;
  mine.title ||= [...text].slice(0, 80).join(""); // by characters: half of one is no text
  mine.messages.push({ role: "user", content: text });
  const question = bubble(mine.messages.at(-1));
  const answer = { role: "assistant", content: "" };
  const item = bubble(answer);
  let whole = false;
  $("messages").append(question, item);
  item.scrollIntoView({ block: "end" });
  running = new AbortController();
  busy(true);
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...mine.messages];
  try {
    const body = { ...parameters(), messages, stream: true, stream_options: { include_usage: true } };
    const began = performance.now();
    const usage = await read(await call("POST", "/v1/chat/completions", body, running.signal), (piece) => {
      answer.content += piece;
      const atEnd = $("messages").scrollHeight - $("messages").scrollTop - $("messages").clientHeight < 80;
      item.append(piece);
      if (atEnd) item.scrollIntoView({ block: "end" });
    });
    const seconds = (performance.now() - began) / 1000;
    whole = true;
    if (usage) note(mine, `${usage.completion_tokens} tokens in ${seconds.toFixed(1)} s`);
  } catch (error) {
    if (error.name === "AbortError") note(mine, "Stopped");
    else note(mine, error instanceof Refusal ? error.message : "The connection to the server was lost. Try again.", true);
  } finally {
    busy(false);
    running = null;
  }
  if (!answer.content) item.remove();
  if (answer.content || whole) mine.messages.push(answer);
  else {
    // Not a word of an answer: the question is to be asked again. Two in a row are more than many models' chats allow.
    mine.messages.pop();
    if (mine === conversation && !$("prompt").value) {
      $("prompt").value = text;
      question.remove();
    }
    if (!mine.messages.length) return;
  }
  await call("PUT", `/web/conversations/${mine.id}`, { title: mine.title, messages: mine.messages })
    .then(showHistory)
    .catch((error) => note(mine, `Not kept: ${error.message}`, true));
}

// Reads server-sent events; an event may come in pieces, and one piece may hold many. Returns the usage.
async function read(response, onText) {
  let held = "";
  let usage = null;
  for await (const piece of pieces(response.body.pipeThrough(new TextDecoderStream()))) {
    held += piece;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return usage;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refusal(chunk.error.message);
      usage = chunk.usage ?? usage;
      const text = chunk.choices[0]?.delta.content;
      if (text) onText(text);
    }
  }
  throw new Error("the stream ended before its end");
}

async function* pieces(stream) {
  const reader = stream.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    yield value;
  }
}

function busy(isBusy) {
  $("send").hidden = isBusy;
  $("stop").hidden = !isBusy;
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  asking = ask(text);
};
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
};
$("stop").onclick = stop;
$("new").onclick = () => open();
$("login").onsubmit = async (event) => {
  event.preventDefault();
  $("login-error").textContent = "";
  try {
    await call("POST", "/web/login", { key: $("key").value.trim() });
    $("key").value = "";
    await start();
  } catch (error) {
    $("login-error").textContent = error.message;
  }
};
$("logout").onclick = async () => {
  await stop();
  await call("POST", "/web/logout");
  open();
  $("history").replaceChildren();
  await start();
};
$("theme").onclick = () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
};
if (localStorage.getItem("theme")) document.documentElement.dataset.theme = localStorage.getItem("theme");
open();
start().catch((error) => { $("app").hidden = false; note(conversation, `The server cannot be reached: ${error.message}`, true); });
