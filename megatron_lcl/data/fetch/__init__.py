"""Images from where they are on the web into an image store: what `megatron-lcl fetch` does.

`urls.py` reads the URLs of an input; `plan.py` writes each once, in parts that share no host; `schedule.py` says which
URL's turn it is (connections and delay of each host, retries); `client.py` fetches one and says kept, dead or refused,
and why; `targets.py` makes of a URL what is requested; `addresses.py` says which addresses are public; `store.py`
writes shards and their tables, all or nothing; `run.py` does the parts in several processes, each of one event loop,
and in jobs of an engine (`data/engines`).

Imports data.corpus, data.engines, data.prepare.importers and data.storage. (Of the importers the readers of JSON lines,
and the names of a store's members.) aiohttp and Protego are the extra `fetch`, imported by `client.py`, which is
imported late, and yarl, which comes with aiohttp, by `targets.py`, too. Begin with the header of `store.py`.
"""
