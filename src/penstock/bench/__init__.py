"""`penstock bench`: measures servers over HTTP (`serve`) and the engine in this process, with vLLM's names for figures."""
