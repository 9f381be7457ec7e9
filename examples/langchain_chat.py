"""LangChain in front of a running `meswitch serve`: `python examples/langchain_chat.py http://127.0.0.1:8000/v1`.

It needs `pip install langchain-openai`. The server speaks OpenAI's protocol, so ChatOpenAI is all there is to it. Every
step of a chain can name its expert, and `auto` lets the router choose.
"""

import sys

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI


def main(url: str) -> None:
    prompt = ChatPromptTemplate.from_messages([("user", "{question}")])
    for model in ("math", "auto"):
        chain = prompt | ChatOpenAI(model=model, base_url=url, api_key="unused", max_tokens=56, temperature=0)
        answer = chain.invoke({"question": "Kim has 32 beads. Kim buys 9 bags with 9 beads each. How many now?"})
        print(f"{model}: {answer.content!r} by {answer.response_metadata['model_name']}")


if __name__ == "__main__":
    main(sys.argv[1])
