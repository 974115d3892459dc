"verifiers' own chat program, in this process: what the tests compare with."
import argparse
from contextlib import AsyncExitStack

import verifiers.v1 as vf
from openai import AsyncOpenAI
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils import compaction, core, mcp

for module in (core, compaction):   # the program is these files, one behind the other
    vars(module).update({k: v for part in (mcp, compaction, core) for k, v in vars(part).items() if not k.startswith("__") and k not in vars(module)})


class ChatHarness(vf.Harness[vf.HarnessConfig]):
    APPENDS_SYSTEM_PROMPT = SUPPORTS_MCP = SUPPORTS_RESUME = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        system, prompt = self.resolve_prompt(data)
        args = argparse.Namespace(tool_interception_url="", bash=False, edit=False, search=False, api_key=secret)
        client = AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0)
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [message_to_wire(m) for m in prompt or []]
        async with AsyncExitStack() as stack:
            tools, dispatch, servers = await core.connect_mcp({"mcpServers": {name: {"url": url} for name, url in mcp_urls.items()}}, stack)
            await core.run_chat_loop(args, core.Compactor(client, ctx.model, tools, False, None), messages, dispatch, servers, None)
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["ChatHarness"]
