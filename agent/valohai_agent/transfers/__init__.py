"""The transfer engine: how bytes come from and go to stores (docs/transfers.md).

From below: `retries` (which failure is worth another try), `wire` (one HTTP/1.1 connection), `pool` (connections that are
kept, proxies, redirects), `hashing`, `ranges` (what to ask for), `disk` (back-pressure), `pace` (progress), then
`download`, `upload` and `parted`. `valohai_agent.transfer.Transferer` is the way in.
"""
