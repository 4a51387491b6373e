"""The script of the README: what the page does, from Python. Its first argument, if any, is the page's address."""

import sys

from gradio_client import Client, handle_file

page = Client(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7860")
lake, lamp = (handle_file(f"app/samples/{name}") for name in ("lake.png", "lamp.txt"))
print(page.predict(lake, "", api_name="/score")["bits_per_byte"], "bits per byte")
files, facts = page.predict(lake, "", "", keep=0.5, samples=2, seed=7, api_name="/generate")
print(files, [each["bits_per_byte"] for each in facts])
recipe = '[[jobs]]\nfiles = "*"\nkeep = 0.5\nseed = 7'  # the same text works with: python -m app generate --recipe
print(page.predict([lake, lamp], recipe, api_name="/batch_plan")["items"])
archive, facts = page.predict([lake, lamp], recipe, api_name="/batch")
print(archive, facts)
