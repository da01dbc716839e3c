from distserve.offline.llm import LLM as LLM
from distserve.offline.outputs import CompletionOutput as CompletionOutput
from distserve.offline.outputs import Delta as Delta
from distserve.offline.outputs import RequestOutput as RequestOutput
from distserve.offline.params import Chat as Chat
from distserve.offline.params import SamplingParams as SamplingParams

__version__: str
