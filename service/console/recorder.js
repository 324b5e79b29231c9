// Audio thread: mixes what the microphone gives down to mono, 16-bit, in pieces of an eighth of a second.
class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Int16Array(Math.round(sampleRate / 8));
    this.filled = 0;
  }

  process([channels]) {
    const frames = channels.length ? channels[0].length : 0;
    for (let frame = 0; frame < frames; frame++) {
      let sum = 0;
      for (const channel of channels) sum += channel[frame];
      const sample = Math.max(-1, Math.min(1, sum / channels.length));
      this.piece[this.filled++] = Math.round(sample * 32767);
      if (this.filled === this.piece.length) {
        const buffer = this.piece.buffer;
        this.piece = new Int16Array(this.piece.length);
        this.filled = 0;
        this.port.postMessage(buffer, [buffer]);
      }
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);
