"""A server and its clients on one machine: 1, 8 and 32 at a time, batches against one by one.

    python bench/serve_clients.py --requests 96 --results bench/results

Each client asks OpenAI's client for captions of scenes, one after the other, until all are
answered. Latencies are in seconds, from asking to the whole answer. With batch_size 1 the
server answers one at a time. Clients and server share the processor.
"""
import asyncio
import base64
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import fire
import openai

from machine import percentile, write_results

ROOT = Path(__file__).parents[1]


def messages(seed):
    from paligemma_nb.scenes import HELD_OUT, make_scene
    make_scene(HELD_OUT + seed).image.save(file := io.BytesIO(), "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return [dict(role="user", content=[dict(type="text", text="caption en"),
                                       dict(type="image_url", image_url=dict(url=url))])]


async def ask_all(address, clients, asked): # -> latencies, seconds in all
    left, latencies = list(asked), []
    async def one(client):
        while left:
            start, message = time.perf_counter(), left.pop()
            await client.chat.completions.create(model="paligemma-tiny", messages=message)
            latencies.append(time.perf_counter() - start)
    async with openai.AsyncOpenAI(base_url=address, api_key="none", timeout=600) as client:
        start = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        return latencies, time.perf_counter() - start


def measure(batch_size, asked): # -> a row of results for each number of clients
    words = [sys.executable, "-m", "paligemma_nb", "serve", "--port", "0", "--device", "cpu",
             "--batch_size", str(batch_size)]
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    server = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http\S+", server.stdout.readline())[0]
        asyncio.run(ask_all(address, 1, asked[:4]))  # warm
        for clients in (1, 8, 32):
            latencies, seconds = asyncio.run(ask_all(address, clients, asked))
            assert len(latencies) == len(asked)
            yield dict(batch_size=batch_size, clients=clients, requests=len(asked),
                       answers_a_second=len(asked) / seconds,
                       median=percentile(latencies, .5), tail=percentile(latencies, .95))
    finally:
        server.kill()
        server.communicate()


def main(requests: int = 96, results: str | None = None):
    asked = [messages(k) for k in range(requests)]
    rows = []
    for batch_size in (1, 16):
        for row in measure(batch_size, asked):
            print(row, flush=True)
            rows.append(row)
    if results: write_results(results, "serving", dict(rows=rows))


if __name__ == "__main__": fire.Fire(main)
