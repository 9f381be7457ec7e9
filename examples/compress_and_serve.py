"""Compress a fine-tune, serve it and ask it: `python examples/compress_and_serve.py [BASE EXPERT]`."""

import json
import subprocess
import sys
from pathlib import Path

from openai import OpenAI

import meswitch

family = Path(__file__).parent / "family"
base, expert = sys.argv[1:] or (family / "base", family / "math")
out = Path("runs/compress_and_serve")
meswitch.compress(base, expert, out / "delta", overwrite=True)
(out / "family.toml").write_text(f'[base]\npath = "{base}"\n[[expert]]\nname = "mine"\ndelta = "delta"\n')
command = [sys.executable, "-m", "meswitch", "serve", str(out), "--port", "0", "--json"]
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
    client = OpenAI(base_url=json.loads(server.stdout.readline())["url"], api_key="unused")
    question = [{"role": "user", "content": "Kim has 32 beads. Kim buys 9 bags with 9 beads each. How many now?"}]
    for model in ("base", "mine"):
        answer = client.chat.completions.create(model=model, messages=question, max_tokens=56)
        print(f"{model}: {answer.choices[0].message.content!r}")
    server.terminate()
