"""Sample file: 60 questions and answers about construction terms, in Korean and English."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

KOREAN_QUESTIONS = [
    "다음 건설 용어를 설명하세요.",
    "건설 현장에서 이 말은 무슨 뜻입니까?",
    "이 용어의 뜻을 한 문장으로 쓰세요.",
]

ENGLISH_QUESTIONS = [
    "Explain this construction term.",
    "What does this word mean on a building site?",
    "Define this term in one sentence.",
]

KOREAN_TERMS = {
    "거푸집": "콘크리트가 굳을 때까지 모양을 잡아 주는 임시 틀입니다.",
    "동바리": "거푸집과 굳지 않은 콘크리트의 무게를 아래에서 받치는 기둥입니다.",
    "비계": "높은 곳에서 일할 수 있도록 건물 바깥에 세우는 임시 발판 구조물입니다.",
    "철근": "콘크리트가 약한 당기는 힘을 대신 받도록 넣는 강철 막대입니다.",
    "양생": "콘크리트가 제 강도를 내도록 물기와 온도를 지켜 주는 일입니다.",
    "타설": "섞은 콘크리트를 거푸집 안에 부어 넣는 작업입니다.",
    "슬럼프 시험": "굳지 않은 콘크리트가 얼마나 묽은지 원뿔 틀로 재는 시험입니다.",
    "기초": "건물의 무게를 땅에 고르게 전하는 가장 아래 구조입니다.",
    "말뚝": "무른 땅을 지나 단단한 층까지 박아 건물을 받치는 긴 기둥입니다.",
    "옹벽": "흙이 무너지지 않도록 뒤에서 미는 힘을 버티는 벽입니다.",
    "흙막이": "땅을 팔 때 둘레의 흙이 무너지지 않게 막는 임시 구조물입니다.",
    "터파기": "기초를 놓을 자리를 만들려고 땅을 파내는 작업입니다.",
    "되메우기": "기초를 만든 뒤 파낸 자리를 흙으로 다시 채우는 작업입니다.",
    "보": "바닥의 무게를 받아 기둥으로 전하는 가로 부재입니다.",
    "기둥": "위층의 무게를 아래로 전하는 세로 부재입니다.",
    "슬래브": "사람과 물건의 무게를 받는 판 모양의 바닥 구조입니다.",
    "내력벽": "위에서 오는 무게를 받는 벽이어서 함부로 헐 수 없습니다.",
    "커튼월": "무게를 받지 않고 건물 바깥을 덮는 가벼운 외벽입니다.",
    "방수": "물이 건물 안으로 스며들지 않도록 막는 공사입니다.",
    "단열재": "열이 드나드는 것을 줄이려고 벽과 지붕에 넣는 재료입니다.",
    "줄눈": "벽돌이나 타일 사이의 틈을 모르타르로 채운 선입니다.",
    "모르타르": "시멘트와 모래를 물로 갠 것으로 벽돌을 붙이는 데 씁니다.",
    "신축 이음": "온도에 따라 늘고 주는 움직임을 받아 주려고 일부러 둔 틈입니다.",
    "앵커 볼트": "기계나 기둥을 콘크리트에 고정하려고 묻는 볼트입니다.",
    "피복 두께": "철근 겉면에서 콘크리트 겉면까지의 거리로 녹과 불을 막아 줍니다.",
    "크레인": "무거운 자재를 들어 올려 옮기는 기계입니다.",
    "안전모": "떨어지는 물건에서 머리를 지키려고 현장에서 꼭 쓰는 모자입니다.",
    "준공": "공사가 모두 끝나 건물을 쓸 수 있게 된 상태입니다.",
    "공정표": "어떤 작업을 언제 시작하고 끝낼지 적은 계획표입니다.",
    "감리": "공사가 설계와 법에 맞게 되는지 살피고 지도하는 일입니다.",
}

ENGLISH_TERMS = {
    "formwork": "A temporary mould that holds concrete in shape until it has set.",
    "shoring": "Props that carry formwork and wet concrete from below until the concrete can carry itself.",
    "scaffold": "A temporary structure outside a building that lets people work safely at height.",
    "rebar": "Steel bars placed in concrete to take the pulling forces that concrete cannot.",
    "curing": "Keeping concrete moist and warm long enough for it to reach its strength.",
    "screed": "A thin, level layer of mortar laid over a floor slab before the finish.",
    "slump test": "A test with a cone-shaped mould that shows how fluid fresh concrete is.",
    "footing": "The widened base under a wall or column that spreads its load over the ground.",
    "pile": "A long column driven or bored through soft ground down to a firm layer.",
    "retaining wall": "A wall that holds back soil and resists its sideways push.",
    "underpinning": "Strengthening the foundation of a building that already stands.",
    "excavation": "Digging out the ground to make room for foundations or a basement.",
    "backfill": "Soil put back around a foundation after it has been built.",
    "beam": "A horizontal member that carries the load of a floor to the columns.",
    "column": "A vertical member that carries the load of the floors above down to the foundation.",
    "lintel": "A short beam over a door or window that carries the wall above the opening.",
    "load-bearing wall": "A wall that carries weight from above and must not be removed without support.",
    "curtain wall": "A light outer wall that covers a building and carries no load but its own.",
    "flashing": "Thin strips of metal that keep rain out where a roof meets a wall.",
    "insulation": "Material in walls and roofs that slows the flow of heat.",
    "grout": "A fluid mix that fills the gaps between tiles or around anchors.",
    "mortar": "A paste of cement, sand and water that binds bricks together.",
    "expansion joint": "A gap left on purpose so that parts can grow and shrink with temperature.",
    "anchor bolt": "A bolt set in concrete that fixes a column or a machine in place.",
    "concrete cover": (
        "The distance from the steel to the surface of the concrete, which keeps out rust and fire."
    ),
    "tower crane": "A tall fixed crane that lifts heavy materials over the whole site.",
    "hard hat": "A helmet that protects the head from falling objects on site.",
    "punch list": "The list of small faults to be mended before a building is handed over.",
    "critical path": "The chain of tasks that decides the earliest day on which a project can end.",
    "change order": "A written agreement to alter the work, price or time of a building contract.",
}


def write_instructions(path: Path | str, seed: int = 0) -> None:
    """Write the 60 questions and answers as instruction JSONL, shuffled by the seed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(instruction_rows())
    Random(seed).shuffle(rows)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    unfinished.replace(path)


def instruction_rows() -> Iterator[dict[str, str]]:
    """The rows of `write_instructions`, Korean first, in the order of the tables above."""
    for questions, terms in ((KOREAN_QUESTIONS, KOREAN_TERMS), (ENGLISH_QUESTIONS, ENGLISH_TERMS)):
        for number, (term, meaning) in enumerate(terms.items()):
            yield {"instruction": questions[number % len(questions)], "input": term, "output": meaning}
