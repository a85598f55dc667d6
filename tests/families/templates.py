"""Short chat templates that behave as the families' own do, each written for these tests.

What they keep of the originals: where a system turn goes, what stands around roles and images, what is stripped, what the generation
prompt ends with, whether an answer is preceded by an empty thought, and what a template cannot take.
"""

# <|im_start|>role … <|im_end|>; `IMAGE` stands for what the family writes for an image.
_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- 'IMAGE' }}
            {%- elif part['type'] == 'video' %}
                {{- 'VIDEO' }}
            {%- elif 'text' in part %}
                {{- part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_DEFAULT_SYSTEM = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
"""


def chatml(image: str, video: str = "", *, default_system: bool = False) -> str:
    """ChatML with these placeholders of an image and a video."""
    body = _CHATML.replace("IMAGE", image).replace("VIDEO", video)
    return (_DEFAULT_SYSTEM if default_system else "") + body


QWEN2_VL = chatml(
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|vision_start|><|video_pad|><|vision_end|>",
    default_system=True,
)
QWEN3_VL = chatml(
    "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
)
INTERNVL = chatml("<IMG_CONTEXT>\\n", "<video>\\n")
OVIS2 = chatml("<image>\\n", default_system=True)

# Texts are stripped. The last answers are preceded by their thought, or an empty one; those before the last question are not.
# The generation prompt opens a thought, unless `enable_thinking` is false.
QWEN3_5 = """\
{%- macro written(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {{- '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- set last.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if last.question < 0 %}
    {{- raise_exception('No user query found in messages.') }}
{%- endif %}
{%- for message in messages %}
    {%- set content = written(message['content']) | trim %}
    {%- if message['role'] == 'assistant' %}
        {%- set thought = message['reasoning_content'] | default('') %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1] | trim %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > last.question %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\\n' + content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# The system turn goes into the first question; roles must alternate; texts are stripped.
_GEMMA = """\
{{- bos_token }}
{%- set ahead = namespace(text='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}
        {%- set ahead.text = messages[0]['content'] + '\\n\\n' %}
    {%- else %}
        {%- set ahead.text = messages[0]['content'][0]['text'] + '\\n\\n' %}
    {%- endif %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {{- ahead.text if loop.first else '' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- 'IMAGE' if part['type'] == 'image' else part['text'] | trim }}
        {%- endfor %}
    {%- endif %}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""
GEMMA3 = _GEMMA.replace("IMAGE", "<start_of_image>")
GEMMA3N = _GEMMA.replace("IMAGE", "<image_soft_token>")

# The generation prompt closes an empty thought that no answer of the history has.
GEMMA4 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- '\\n\\n<|image|>\\n\\n' if part['type'] == 'image' else part['text'] | trim }}
        {%- endfor %}
    {%- endif %}
    {{- '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn>model\\n' }}
    {%- if not enable_thinking | default(false) %}
        {{- '<|channel>thought\\n<channel|>' }}
    {%- endif %}
{%- endif %}
"""

# LLaVA-NeXT on Mistral: images first; no generation prompt, so that the model writes the space before its answer.
LLAVA_NEXT_MISTRAL = """\
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- '<<SYS>>\\n' + message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST] ' }}
        {%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}
        {%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}
        {{- ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'][0]['text'] + '</s>' }}
    {%- endif %}
{%- endfor %}
"""

# The space after the role is not in the generation prompt.
LLAVA_ONEVISION = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + ' ' }}
    {%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}
    {%- for part in message['content'] if part['type'] == 'text' %}
        {%- if message['role'] == 'assistant' %}
            {% generation %}{{ '\\n' + part['text'] }}{% endgeneration %}
        {%- else %}
            {{- '\\n' + part['text'] }}
        {%- endif %}
    {%- endfor %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAVA_VICUNA = """\
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'][0]['text'] + ' ' }}
    {%- else %}
        {{- message['role'].upper() + ': ' }}
        {%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}
        {%- for part in message['content'] if part['type'] == 'text' %}
            {{- part['text'] + ('</s>' if message['role'] == 'assistant' else ' ') }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
"""

_LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
    {{- 'OPEN' + message['role'] + 'SHUT\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- '<|image|>' if part['type'] == 'image' else part['text'] | trim }}
        {%- endfor %}
    {%- endif %}
    {{- 'END' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'OPENassistantSHUT\\n\\n' }}
{%- endif %}
"""
LLAMA3 = (
    _LLAMA.replace("OPEN", "<|start_header_id|>")
    .replace("SHUT", "<|end_header_id|>")
    .replace("END", "<|eot_id|>")
)
LLAMA4 = _LLAMA.replace("OPEN", "<|header_start|>").replace("SHUT", "<|header_end|>").replace("END", "<|eot|>")
# Llama 3.2's own: a system header with today's date in each conversation, and a system turn whose content is stripped as a string.
LLAMA3_DATED = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now('%d %b %Y') %}
    {%- else %}
        {%- set date_string = '26 Jul 2024' %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{%- set pictured = namespace(images=false) %}
{%- for message in messages %}
    {%- for part in message['content'] if message['content'] is not string and part['type'] == 'image' %}
        {%- set pictured.images = true %}
    {%- endfor %}
{%- endfor %}
{%- if pictured.images and system_message != '' %}
    {{- raise_exception('Prompting with images is incompatible with system messages.') }}
{%- endif %}
{%- if not pictured.images %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n' }}
    {{- 'Today Date: ' + date_string + '\\n\\n' + system_message + '<|eot_id|>' }}
{%- endif %}
""" + LLAMA3.removeprefix("{{- bos_token }}\n")

# Mistral: an image stands where it was written; roles alternate after the system turn; no space before the answer.
_MISTRAL = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- '[SYSTEM_PROMPT]' + (messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text']) + '[/SYSTEM_PROMPT]' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST]' }}
        {%- if message['content'] is string %}
            {{- message['content'] }}
        {%- else %}
            {%- for part in message['content'] %}
                {{- '[IMG]' if part['type'] == 'image' else part['text'] }}
            {%- endfor %}
        {%- endif %}
        {{- '[/INST]' }}
    {%- else %}
        ANSWER
    {%- endif %}
{%- endfor %}
"""
MISTRAL3 = _MISTRAL.replace(
    "ANSWER",
    "{{- (message['content'] if message['content'] is string else message['content'][0]['text']) + eos_token }}",
)
PIXTRAL = MISTRAL3
# As the first Pixtral's: a question may have parts, an answer must be a string.
PIXTRAL_STRINGS = _MISTRAL.replace("ANSWER", "{{- message['content'] + eos_token }}")

GLM4V = """\
{{- '[gMASK]<sop>' }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- '<|begin_of_image|><|image|><|end_of_image|>' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""
# Answers carry an empty thought; the generation prompt has one only with `enable_thinking` false, and then /nothink ends the question.
GLM45V = """\
{%- macro written(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {{- '<|begin_of_image|><|image|><|end_of_image|>' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set silent = enable_thinking is defined and not enable_thinking %}
{{- '[gMASK]<sop>' }}
{%- for message in messages %}
    {%- set content = written(message['content']) %}
    {%- if message['role'] == 'assistant' %}
        {%- if '</think>' in content %}
            {{- '<|assistant|>\\n<think>' + content.split('</think>')[0].split('<think>')[-1] + '</think>' }}
            {%- set content = content.split('</think>')[-1] %}
        {%- else %}
            {{- '<|assistant|>\\n<think></think>' }}
        {%- endif %}
        {{- '\\n' + content | trim if content | trim else '' }}
    {%- else %}
        {{- '<|' + message['role'] + '|>\\n' + content }}
        {{- '/nothink' if message['role'] == 'user' and silent and not content.endswith('/nothink') else '' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' + ('<think></think>\\n' if silent else '') }}
{%- endif %}
"""

_COHERE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>'}[message['role']] %}
    {{- '<|START_OF_TURN_TOKEN|>' + role + ('<|START_RESPONSE|>' if message['role'] == 'assistant' else '') }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- 'IMAGE' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- ('<|END_RESPONSE|>' if message['role'] == 'assistant' else '') + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' }}
{%- endif %}
"""
AYA = _COHERE.replace("IMAGE", "<image>")
COHERE2 = _COHERE.replace("IMAGE", "<|IMG_PATCH|>")
"""Cohere2's in a dict with a second one for documents, as processors with several templates have them."""
COHERE2_SEVERAL = {"default": COHERE2, "rag": "{{- raise_exception('documents are missing') }}"}

DEEPSEEK_VL = """\
{%- if messages[0]['role'] != 'system' %}
    {{- 'You are a helpful language and vision assistant.\\n\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- {'user': 'User: ', 'assistant': 'Assistant: ', 'system': ''}[message['role']] }}
    {%- for part in message['content'] %}
        {{- '<image_placeholder>\\n' if part['type'] == 'image' else part['text'] }}
    {%- endfor %}
    {{- eos_token if message['role'] == 'assistant' else '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
"""

_IDEFICS = """\
{{- 'HEAD' }}
{%- for message in messages %}
    {{- message['role'] | capitalize + (':' if message['content'][0]['type'] == 'image' else ': ') }}
    {%- for part in message['content'] %}
        {{- '<image>' if part['type'] == 'image' else part['text'] }}
    {%- endfor %}
    {{- '<end_of_utterance>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
"""
IDEFICS2 = _IDEFICS.replace("{{- 'HEAD' }}\n", "")
SMOLVLM = _IDEFICS.replace("HEAD", "<|im_start|>")

# With marks of what the model writes.
LFM2_VL = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {% generation %}{{ message['content'][0]['text'] }}{{ '<|im_end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- '<image>' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# A template that joins strings: content of parts is a TypeError.
STRINGS_ONLY = """\
{%- for message in messages %}
    {{- message['role'] | capitalize + ': ' + message['content'] + ('</s>' if message['role'] == 'assistant' else '\\n') }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
"""

KIMI = """\
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>' }}
    {%- endif %}
    {{- '<|im_' + message['role'] + '|>' + message['role'] + '<|im_middle|>' }}
    {{- '<think></think>' if message['role'] == 'assistant' else '' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- '<|media_begin|>image<|media_content|><|media_pad|><|media_end|>' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_assistant|>assistant<|im_middle|>' + ('<think></think>' if thinking is defined and not thinking else '<think>') }}
{%- endif %}
"""
