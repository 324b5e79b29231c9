// The console: what the service can do, tried from a browser with a microphone. It has no more rights than its API key.

const byId = (id) => document.getElementById(id);
const ENROL_S = 4;
const CLAIM_S = 3;
const MOST_ROWS = 50;
const MOST_SPEAKERS = 100;
// How long the service has to tell what it still heard, after the last of the audio.
const LAST_WORDS_S = 3;
// WebSockets and raw PCM are taken up to this rate.
const HIGHEST_RATE_HZ = 48000;
const TYPES = { wav: "audio/wav", flac: "audio/flac", ogg: "audio/ogg", opus: "audio/ogg", oga: "audio/ogg", mp3: "audio/mpeg" };

// Not kept anywhere: other pages of this origin, the documentation among them, load scripts from elsewhere.
const apiKey = () => byId("key").value.trim();
byId("key").addEventListener("change", () => begin());

function say(problem) {
  byId("fault").textContent = problem;
  byId("fault").hidden = !problem;
}

/** Whatever goes wrong in a handler is said on the page; meanwhile its buttons cannot be pressed again. */
function guarded(work, ...buttons) {
  return async (event) => {
    say("");
    for (const button of buttons) byId(button).disabled = true;
    try {
      await work(event);
    } catch (error) {
      say(error.message);
      byId("verdict").textContent = "";
    } finally {
      for (const button of buttons) byId(button).disabled = false;
    }
  };
}

/** The answer's JSON; problem details become an Error with their words. */
async function ask(path, options = {}) {
  const key = apiKey();
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    byId("key-row").hidden = false;
    throw new Error(key ? "The service does not know this API key." : "This service asks for an API key: enter it above.");
  }
  if (response.status === 204) return null;
  const body = await response.json();
  if (!response.ok) throw new Error(body.detail ?? body.title);
  return body;
}

function cells(row) {
  const line = document.createElement("tr");
  for (const text of row) {
    const cell = document.createElement("td");
    if (text instanceof Node) cell.append(text);
    else cell.textContent = text;
    line.append(cell);
  }
  return line;
}

const seconds = (value) => `${value.toFixed(2)} s`;
const eventRow = (event) => cells([event.keyword, event.score.toFixed(2), seconds(event.start_s), seconds(event.end_s)]);

/** A microphone that gives pieces of 16-bit mono to `take`, until it is closed. */
async function microphone(take) {
  if (!navigator.mediaDevices) throw new Error("Browsers give a microphone to pages on localhost or behind HTTPS only.");
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: false, autoGainControl: false } });
  let context = new AudioContext();
  if (context.sampleRate > HIGHEST_RATE_HZ) {
    await context.close();
    context = new AudioContext({ sampleRate: HIGHEST_RATE_HZ });
  }
  try {
    await context.audioWorklet.addModule("console/recorder.js");
    const recorder = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
    recorder.port.onmessage = ({ data }) => {
      byId("level").value = Math.sqrt(new Int16Array(data).reduce((sum, x) => sum + x * x, 0) / (data.byteLength / 2)) / 8192;
      take(data);
    };
    context.createMediaStreamSource(stream).connect(recorder);
  } catch (error) {
    stream.getTracks().forEach((track) => track.stop());
    await context.close();
    throw error;
  }
  return {
    rate: context.sampleRate,
    close() {
      stream.getTracks().forEach((track) => track.stop());
      byId("level").value = 0;
      return context.close();
    },
  };
}

let stopListening = null;

/** What the field asks for; a refused stream could not say which word is unknown. */
function wantedWords() {
  const words = byId("words").value.split(",").map((text) => text.trim()).filter(Boolean);
  const known = new Set([...byId("keywords").options].map((option) => option.value));
  const unknown = words.filter((word) => !known.has(word));
  if (unknown.length) throw new Error(`The model does not know ${unknown.join(", ")}.`);
  return words;
}

async function listen() {
  if (stopListening) return stopListening();
  const words = wantedWords();
  let socket = null;
  const source = await microphone((piece) => {
    if (socket?.readyState === WebSocket.OPEN) socket.send(piece);
  });
  try {
    const query = new URLSearchParams({ rate: String(source.rate) });
    for (const word of words) query.append("keywords", word);
    const address = new URL(`v1/keywords/stream?${query}`, location.href);
    address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    socket = new WebSocket(address, apiKey() ? ["bearer", apiKey()] : []);
  } catch (error) {
    await source.close();
    throw error;
  }
  byId("heard").replaceChildren();
  byId("listen").textContent = "Stop";
  let asked = false;
  let opened = false;
  stopListening = () => {
    asked = true;
    stopListening = null;
    // From now on nothing more is heard, whatever becomes of the connection.
    source.close();
    byId("listen").textContent = "Listen to the microphone";
    if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type: "end" }));
    setTimeout(() => socket.close(), LAST_WORDS_S * 1000);
  };
  socket.onmessage = ({ data }) => {
    const message = JSON.parse(data);
    if (message.type === "ready") {
      opened = true;
      byId("listening").textContent = `${message.model.name}@${message.model.version} listens`;
    }
    if (message.type === "detection") {
      byId("heard").prepend(eventRow(message));
      while (byId("heard").childElementCount > MOST_ROWS) byId("heard").lastElementChild.remove();
    }
    if (message.type === "error") say(message.detail);
  };
  socket.onclose = ({ code }) => {
    byId("listening").textContent = "";
    if (asked) return;
    stopListening();
    if (!opened) say("The service refused the stream, or cannot be reached.");
    else if (byId("fault").hidden) say(`The stream was closed (code ${code}).`);
  };
}

async function record(length_s) {
  stopListening?.();
  const pieces = [];
  const source = await microphone((piece) => pieces.push(piece));
  byId("verdict").textContent = `Speak for ${length_s} seconds …`;
  await new Promise((done) => setTimeout(done, length_s * 1000));
  await source.close();
  return { method: "POST", body: new Blob(pieces), headers: { "Content-Type": `audio/pcm;rate=${source.rate}` } };
}

const speaker = () => encodeURIComponent(byId("speaker").value.trim());

async function enrol() {
  const answer = await ask(`v1/speakers/${speaker()}/enrollments`, await record(ENROL_S));
  const refused = answer.clips.filter((clip) => !clip.accepted).map((clip) => clip.reason);
  byId("verdict").textContent = refused.length
    ? `Not taken: ${refused.join(", ")}.`
    : `${answer.speaker_id}: ${answer.speech_s.toFixed(1)} of ${answer.required_speech_s.toFixed(1)} s of speech, ${answer.status}.`;
  await listSpeakers();
}

async function verify() {
  const answer = await ask(`v1/speakers/${speaker()}/verify`, await record(CLAIM_S));
  const verdict = answer.accepted ? "accepted" : "refused";
  byId("verdict").textContent = `${answer.speaker_id}: ${verdict}, score ${answer.score.toFixed(2)}.`;
}

async function identify() {
  const answer = await ask("v1/speakers/identify", await record(CLAIM_S));
  const best = answer.candidates.map((one) => `${one.speaker_id} ${one.score.toFixed(2)}`).join(", ");
  byId("verdict").textContent = `${answer.identified ?? "Nobody who is enrolled"} (${best || "nobody to compare with"}).`;
}

async function listSpeakers() {
  const { speakers, next_cursor: more } = await ask(`v1/speakers?limit=${MOST_SPEAKERS}`);
  const rows = speakers.map((one) => {
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "Delete";
    remove.addEventListener("click", guarded(async () => {
      if (!confirm(`Delete all that is stored of ${one.speaker_id}?`)) return;
      await ask(`v1/speakers/${encodeURIComponent(one.speaker_id)}`, { method: "DELETE" });
      await listSpeakers();
    }));
    return cells([one.speaker_id, one.status, `${one.speech_s.toFixed(1)} s`, remove]);
  });
  if (more) rows.push(cells([`and more than ${MOST_SPEAKERS}`, "", "", ""]));
  byId("speakers").replaceChildren(...rows);
}

async function detectInFile() {
  const [file] = byId("file").files;
  if (!file) return;
  const type = TYPES[file.name.split(".").pop().toLowerCase()] ?? (file.type || "audio/wav");
  const answer = await ask("v1/keywords/detect", { method: "POST", body: file, headers: { "Content-Type": type } });
  byId("found").replaceChildren(...answer.detections.map(eventRow));
  byId("top").textContent = answer.top.map((one) => `${one.keyword} ${one.score.toFixed(2)}`).join(", ");
}

const begin = guarded(async () => {
  const { default: model } = await ask("v1/models");
  byId("model").textContent = `${model.name}@${model.version}`;
  const { keywords } = await ask("v1/keywords");
  byId("keywords").replaceChildren(...keywords.map(({ keyword }) => Object.assign(document.createElement("option"), { value: keyword })));
  const { versions } = await ask(`v1/models/${encodeURIComponent(model.name)}`);
  const tasks = versions.find((one) => one.version === model.version)?.tasks ?? [];
  byId("voices").hidden = !tasks.includes("speaker");
  if (!byId("voices").hidden) await listSpeakers();
});

const VOICES = ["enrol", "verify", "identify"];
byId("listen").addEventListener("click", guarded(listen, "listen"));
byId("file").addEventListener("change", guarded(detectInFile));
byId("enrol").addEventListener("click", guarded(enrol, ...VOICES));
byId("verify").addEventListener("click", guarded(verify, ...VOICES));
byId("identify").addEventListener("click", guarded(identify, ...VOICES));
begin();
