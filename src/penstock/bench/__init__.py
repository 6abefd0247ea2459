"""`penstock bench`: measures servers over HTTP and the engine in this process, under vLLM's names for figures."""
