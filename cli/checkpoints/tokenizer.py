"""A small tokenizer of our own in the released folder's form: byte-level BPE, so that any Unicode text round-trips."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from cli.checkpoints.writers import replacing

NUM_TOKENS = 1000
"""Most ids it gives: 0 <pad>, 1 </s>, 2 <unk>, 256 bytes, then merges."""

_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"

_WORDS = """
a about above across after again against air all along an and animal another are around as at away back background
ball bark beach beat beautiful bell below beneath between bird blue blur boat body book bright bring brown building
busy call calm camera car carry cat chair child city clap clear close cloud coast cold color come cook crackle crowd
cup curtain dance dark day deep desk distant distortion dog door down drink drive drop drum dusk early earth echo
empty evening eye face fall family far fast father field fill film fire floor flower fly follow food foot forest
forward frame friend from front garden gentle girl glass golden grass gray great green ground group guitar hair hall
hand happy has have he head hear heart heavy her high hill his hold home horse house hum in inside instrument interior
into is island it jitter jump keeper kitchen lake lamp land laugh leaf leave left light lighthouse like line listen
little long look loud low machine man many market metal middle moon morning mother motion mountain mouth move muffled
music near night noise ocean of off old on open orange orchestra other out outside over paint paper park people person
piano picture piece place plant play portrait quiet rain red rhythm right ring river road robotic rock roof room run
sand say says scene sea shadow she shine shop shot side sing singer sit sky slow small smile smoke snow soft song
sound speak speech stand star steady stone storm street sun surface sweet swim table take talk tall tell that the
their them then there they thin thing thunder time to together tone top town train tree turn two under up us voice
walk wall warm watch water wave we wear weather wheel while whisper white wide wild wind window winter with woman wood
word work world yellow young audio video bad hands coming AUDCAP ENDAUDCAP Audio The A In On He She They It We You I
Hello hello you your will would can could should this those
"""


def build_tokenizer() -> Tokenizer:
    """The same tokenizer every time: trained on a fixed list of words."""
    tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = _WORDS.split()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        special_tokens=[_PAD, _END, _UNKNOWN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*words, " " + " ".join(words)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, 1)])
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    special = {"eos_token": _END, "pad_token": _PAD, "unk_token": _UNKNOWN}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special}
    files = {
        "tokenizer.json": build_tokenizer().to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps(special, indent=2),
    }
    for name, text in files.items():
        with replacing(folder / name) as file:
            file.write(text.encode() + b"\n")
