"""One rank: a plan becomes tensors, tensors become tokens. The only room that knows both requests and tensors."""
