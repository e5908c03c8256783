"""Raw pairs -> shards -> batches, exactly: nothing disappears, and each epoch is every sample once.

Read `sources.py` (what people have; `reading/` reads each kind), `sample_files.py`, `preparing.py`, `pack.py`,
`tar_writer.py` with `shard_index.py`, and `shards.py` (shards written and read; `indexing/` is for tars that others
wrote), `pairs.py`, `sampling/`, `tar_stream.py` and `module.py` (batches), then `preflight.py`, `findings.py` and
`advice.py` (what would spoil training), and `wordings/` (what captions have in common). No model.
"""
