"""What clients send and get, in OpenAI's protocols and Anthropic's. Nothing here knows the engine's threads.

`schema` has requests, `answers` responses, `chat` what an expert's template makes of both; `responses` and `messages`
are two more protocols, as chat requests and back.
"""
