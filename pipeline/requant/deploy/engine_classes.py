"""The table of model classes: which of them engines have, by `architectures` of config.json.

Read off the engines' registries, which each entry names; tests hold vLLM's to the installed one. `engine_support` asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Has = Literal["own", "generic", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """Model classes of one engine. Names are those of transformers, or of the checkpoint's own code.

    own: the engine has a model file for it. generic: it runs it by transformers' code, and says so. asks: methods of a
    class of transformers, one of which must answer yes for the engine to run a class it does not know. refuses: own
    class -> what goes wrong with any GPTQ checkpoint of it. refuses_experts: the same with quantized experts only.
    refuses_gptq: the same in GPTQ only, not in other formats.
    experts_in_16_bit: classes whose experts it builds in 16 bit, whatever the config says: it reads those left so.
    embeds: classes that hand the quantization config on to their token embeddings.
    """

    name: str
    source: str
    own: frozenset[str]
    generic: frozenset[str] = frozenset()
    asks: tuple[str, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)
    refuses_experts: Mapping[str, str] = field(default_factory=dict)
    refuses_gptq: Mapping[str, str] = field(default_factory=dict)
    experts_in_16_bit: frozenset[str] = frozenset()
    embeds: frozenset[str] = frozenset()

    def has(self, architecture: str, model_class: type) -> Has:
        """How the engine runs what config.json calls `architecture`, of the class `model_class`."""
        if architecture in self.own:
            return "own"
        able = any(getattr(model_class, question, lambda: False)() for question in self.asks)
        return "generic" if able or architecture in self.generic else "none"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


VLLM = Registry(
    name="vLLM 0.33.0",
    source="vllm/model_executor/models/registry.py and the model files that it names, read 2026-11-30",
    own=_names("""
    AfmoeForCausalLM AliceAIForCausalLM Alpamayo2Super ApertusForCausalLM AriaForConditionalGeneration
    AudioFlamingo3ForConditionalGeneration AXK1ForCausalLM BagelForConditionalGeneration BailingMoeForCausalLM
    BailingMoeV2_5ForCausalLM BailingMoeV2ForCausalLM BailingMoeV3ForCausalLM BailingMoeV3VLForConditionalGeneration
    BeamForCausalLM BeeForConditionalGeneration Blip2ForConditionalGeneration BloomForCausalLM
    ChatGLMForConditionalGeneration ChatGLMModel Cohere2ForCausalLM Cohere2MoeForCausalLM
    Cohere2VisionForConditionalGeneration CohereAsrForConditionalGeneration CohereCompassForConditionalGeneration
    CohereForCausalLM Cosmos3EdgeForConditionalGeneration Cosmos3ForConditionalGeneration DbrxForCausalLM
    DeciLMForCausalLM DeepseekForCausalLM DeepseekOCR2ForCausalLM DeepseekOCRForCausalLM DeepseekV2ForCausalLM
    DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV41ForCausalLM DeepseekV4ForCausalLM
    DeepseekV4ForConditionalGeneration DeepseekVLV2ForCausalLM DiffusionGemmaForBlockDiffusion DomynEdgeForCausalLM
    DoryForCausalLM Dots3NoteForCausalLM DotsOCRForCausalLM Eagle2_5_VLForConditionalGeneration Ernie4_5_MoeForCausalLM
    Ernie4_5_VLMoeForConditionalGeneration Ernie4_5ForCausalLM Exaone4_5_ForConditionalGeneration Exaone4ForCausalLM
    ExaoneForCausalLM ExaoneMoeForCausalLM ExaoneMoEForCausalLM FalconForCausalLM FalconH1ForCausalLM
    FalconMambaForCausalLM FireRedASR2ForConditionalGeneration FlintForCausalLM FunASRForConditionalGeneration
    FunAudioChatForConditionalGeneration Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration
    Gemma3nForCausalLM Gemma3nForConditionalGeneration Gemma4ForCausalLM Gemma4ForConditionalGeneration
    Gemma4UnifiedForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM
    GLM4VForCausalLM Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration Glm5NextForCausalLM
    Glm5NextForConditionalGeneration GlmAsrForConditionalGeneration GlmMoeDsaForCausalLM GlmOcrForConditionalGeneration
    GPT2LMHeadModel GPTJForCausalLM GptOssForCausalLM Granite4VisionForConditionalGeneration GraniteForCausalLM
    GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSharedForCausalLM GraniteMoeSWAForCausalLM
    GraniteSpeechForConditionalGeneration GraniteSpeechPlusForConditionalGeneration GraniteSWAForCausalLM H2OVLChatModel
    HCXVisionV2ForCausalLM HfMoondream HrmTextForCausalLM HyperCLOVAXForCausalLM HYV3ForCausalLM HYV4ForCausalLM
    Idefics3ForConditionalGeneration InklingForCausalLM InklingForConditionalGeneration InternLM2ForCausalLM
    InternLM3ForCausalLM InternS1ForConditionalGeneration InternS1ProForConditionalGeneration
    InternS2MobiusForConditionalGeneration InternS2PreviewForConditionalGeneration InternVLChatModel
    InternVLForConditionalGeneration IQuestCoderForCausalLM IQuestLoopCoderForCausalLM IsaacForConditionalGeneration
    JambaForCausalLM K2HorizonForCausalLM KananaVForConditionalGeneration KeyeForConditionalGeneration
    KeyeVL1_5ForConditionalGeneration KimiK25ForConditionalGeneration KimiK3ForConditionalGeneration
    KimiLinearForCausalLM KimiVLForConditionalGeneration LagunaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM
    Lfm2VlForConditionalGeneration LightOnOCRForConditionalGeneration Llama4ForCausalLM Llama4ForConditionalGeneration
    Llama_Nemotron_Nano_VL LLaMAForCausalLM LlamaForCausalLM LlavaForConditionalGeneration
    LlavaNextForConditionalGeneration LlavaNextVideoForConditionalGeneration LlavaOnevision2ForConditionalGeneration
    LlavaOnevisionForConditionalGeneration LongcatFlashForCausalLM LongcatFlashNgramForCausalLM Mamba2ForCausalLM
    MambaForCausalLM MiDashengLMModel MiMoForCausalLM MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiMoV2OmniForCausalLM
    MiniCPM3ForCausalLM MiniCPMForCausalLM MiniCPMO MiniCPMOcrForConditionalGeneration MiniCPMV
    MiniCPMV4_6ForConditionalGeneration MiniCPMV4_7ForConditionalGeneration MiniMaxM2ForCausalLM
    MiniMaxM3SparseForCausalLM MiniMaxM3SparseForConditionalGeneration Ministral3ForCausalLM
    Mistral3ForConditionalGeneration MistralForCausalLM MistralLarge3ForCausalLM MixtralForCausalLM
    Molmo2ForConditionalGeneration MolmoForCausalLM Moondream3ForCausalLM MoonshotKimiaForCausalLM MossAudioModel
    MossTranscribeDiarizeForConditionalGeneration MuseGlimmerForCausalLM MuseGlimmerForConditionalGeneration
    MuseSparkForConditionalGeneration NemotronForCausalLM NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2
    NemotronH_Omni_Reasoning_V3 NemotronH_Super_Omni_Reasoning_V3 NemotronHForCausalLM NemotronHPuzzleForCausalLM
    NemotronParseForConditionalGeneration NVLM_D OlmoeForCausalLM OlmoHybridForCausalLM OpenCUAForConditionalGeneration
    OpenPanguVLForConditionalGeneration OpenVLAForActionPrediction OPTForCausalLM OrionForCausalLM Ovis Ovis2_5
    Ovis2_6_MoeForCausalLM Ovis2_6ForCausalLM PaddleOCRVLForConditionalGeneration PaliGemmaForConditionalGeneration
    PanguEmbeddedForCausalLM PanguProMoEV2ForCausalLM PanguUltraMoEForCausalLM Param2MoEForCausalLM Phi3ForCausalLM
    Phi3VForCausalLM Phi4ForCausalLMV Phi4MMForCausalLM PhiMoEForCausalLM PixtralForConditionalGeneration
    Plamo3ForCausalLM QianfanOCRForConditionalGeneration Qwen2_5_VLForConditionalGeneration
    Qwen2_5OmniForConditionalGeneration Qwen2_5OmniModel Qwen2AudioForConditionalGeneration Qwen2ForCausalLM
    Qwen2MoeForCausalLM Qwen2VLForConditionalGeneration Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration
    Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration Qwen3ASRForConditionalGeneration Qwen3ASRRealtimeGeneration
    Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3OmniMoeForConditionalGeneration
    Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen4ExpForCausalLM
    Qwen4ExpForConditionalGeneration RadioMBartPrefixForCausalLM RForConditionalGeneration Rnj1ForCausalLM
    SarvamMLAForCausalLM SarvamMoEForCausalLM SkyworkR1VChatModel SmolVLMForConditionalGeneration SolarForCausalLM
    StableLmForCausalLM Step1ForCausalLM Step3p5ForCausalLM Step3p7ForConditionalGeneration Step3TextForCausalLM
    Step3VLForConditionalGeneration Step5ForCausalLM Step5ForConditionalGeneration StepVLForConditionalGeneration
    TeleChat2ForCausalLM TeleChat3ForCausalLM TeleFLMForCausalLM UltravoxModel UnlimitedOCRForCausalLM
    VoxtralForConditionalGeneration VoxtralRealtimeGeneration WhisperForConditionalGeneration Zamba2ForCausalLM
    """),
    generic=_names("""
    ArceeForCausalLM CwmForCausalLM Emu3ForConditionalGeneration FlexOlmoForCausalLM GlmForCausalLM
    GPTBigCodeForCausalLM GPTNeoXForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM
    HunYuanVLForConditionalGeneration Jais2ForCausalLM Kolibri1ForCausalLM MellumForCausalLM NanbeigeForCausalLM
    Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM PhiForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM
    Starcoder2ForCausalLM VaultGemmaForCausalLM VibeVoiceAsrForConditionalGeneration
    """),
    asks=("is_backend_compatible", "_can_set_attn_implementation"),
    refuses={
        "DbrxForCausalLM": "its loader looks for experts under names that its layers no longer have, in 16 bit too",
        "JambaForCausalLM": "its loader stops at g_idx, which every GPTQ checkpoint has",
        "MambaForCausalLM": "it builds no quantized Mamba mixers",
        "FalconMambaForCausalLM": "it builds no quantized Mamba mixers",
    },
    refuses_experts={
        "GptOssForCausalLM": "it passes over single experts, whose weights would be random",
        "InklingForCausalLM": "it reads the experts of a layer as one tensor only",
        "InklingForConditionalGeneration": "it reads the experts of a layer as one tensor only",
    },
    refuses_gptq={
        "LongcatFlashForCausalLM": "it takes the matrix of q_a_proj and kv_a_proj_with_mqa for one in 16 bit",
    },
    embeds=_names("""
    ApertusForCausalLM AXK1ForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM DeciLMForCausalLM
    DeepseekForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM Ernie4_5_MoeForCausalLM Exaone4ForCausalLM
    ExaoneForCausalLM ExaoneMoeForCausalLM ExaoneMoEForCausalLM Gemma3ForCausalLM Gemma3nForCausalLM Gemma4ForCausalLM
    Glm4MoeLiteForCausalLM GPT2LMHeadModel GraniteForCausalLM GraniteMoeSharedForCausalLM HrmTextForCausalLM
    HyperCLOVAXForCausalLM InternLM3ForCausalLM LagunaForCausalLM LlamaForCausalLM MiMoForCausalLM
    MiMoV2FlashForCausalLM MiniMaxM2ForCausalLM MistralForCausalLM NemotronHForCausalLM OlmoeForCausalLM
    Phi3ForCausalLM Phi3VForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM
    SarvamMLAForCausalLM SarvamMoEForCausalLM StableLmForCausalLM
    """),  # of vLLM 0.32.0: their model file, or that of the class they are, gives the embedding a quant_config
)

SGLANG = Registry(
    name="SGLang 0.5.23",
    source="sglang/srt/models/*.py (EntryClass), read 2026-11-30",
    own=_names("""
    AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM BaichuanForCausalLM BailingMM2NativeForConditionalGeneration
    BailingMMNativeForConditionalGeneration BailingMoEForCausalLM BailingMoeForCausalLM BailingMoeV2_5ForCausalLM
    BailingMoeV2ForCausalLM BailingMoeV3ForCausalLM BailingMoeV3VLForConditionalGeneration BeamForCausalLM
    ChatGLMModel Cohere2ForCausalLM Cohere2MoeForCausalLM Cohere2VisionForConditionalGeneration CohereForCausalLM
    Cosmos3EdgeForConditionalGeneration Cosmos3ForConditionalGeneration DbrxForCausalLM DeciLMForCausalLM
    DeepseekForCausalLM DeepseekOCRForCausalLM DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV3ForCausalLM
    DeepseekV4ForCausalLM DeepseekVL2ForCausalLM DFlashLagunaForCausalLM DiffusionGemmaForBlockDiffusion
    Dots3NoteForCausalLM DotsOCRForCausalLM DotsVLMForCausalLM Ernie4_5_ForCausalLM Ernie4_5_MoeForCausalLM
    Ernie4_5_VLMoeForConditionalGeneration Exaone4ForCausalLM ExaoneForCausalLM ExaoneMoEForCausalLM
    ExaoneMoeForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
    Gemma3ForConditionalGeneration Gemma3nForCausalLM Gemma3nForConditionalGeneration Gemma4AssistantForCausalLM
    Gemma4ForCausalLM Gemma4ForConditionalGeneration Gemma4UnifiedAssistantForCausalLM
    Gemma4UnifiedForConditionalGeneration GemmaForCausalLM GigaChat35ForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM
    Glm4MoeLiteForCausalLM Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration
    Glm5NextForConditionalGeneration GlmAsrForConditionalGeneration GlmImageForConditionalGeneration
    GlmMoeDsaForCausalLM GlmOcrForConditionalGeneration GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM
    GptOssForCausalLM GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSharedForCausalLM
    GraniteMoeSWAForCausalLM GraniteSWAForCausalLM Grok1ForCausalLM Grok1ModelForCausalLM HrmTextForCausalLM
    HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM HYV3ForCausalLM HYV4ForCausalLM InklingForConditionalGeneration
    InternLM2ForCausalLM InternLM3ForCausalLM InternS1ForConditionalGeneration InternS1ProForConditionalGeneration
    InternS2MobiusForConditionalGeneration InternS2PreviewForConditionalGeneration InternVLChatModel
    IQuestCoderForCausalLM IQuestLoopCoderForCausalLM IQuestQ1ForCausalLM JetNemotronForCausalLM
    JetVLMForConditionalGeneration K2HorizonForCausalLM KimiK25ForConditionalGeneration KimiK3ForConditionalGeneration
    KimiK3LinearForCausalLM KimiLinearForCausalLM KimiVLForConditionalGeneration LagunaForCausalLM Lfm2ForCausalLM
    Lfm2MoeForCausalLM Lfm2VlForConditionalGeneration LightOnOCRForConditionalGeneration LLaDA2MoeModelLM
    Llama4ForCausalLM Llama4ForConditionalGeneration LlamaForCausalLM LlavaForConditionalGeneration
    LlavaLlamaForCausalLM LlavaMistralForCausalLM LlavaQwenForCausalLM LlavaVidForCausalLM
    LocateAnythingForConditionalGeneration LongcatFlashForCausalLM Mamba2ForCausalLM MambaForCausalLM
    MellumForCausalLM MiDashengLMModel MiMoForCausalLM MiMoV2ASRForCausalLM MiMoV2FlashForCausalLM MiMoV2ForCausalLM
    MindSporeForCausalLM MiniCPM3ForCausalLM MiniCPMForCausalLM MiniCPMO MiniCPMSALAForCausalLM MiniCPMV
    MiniCPMV4_6ForConditionalGeneration MiniCPMV4_7ForConditionalGeneration MiniMaxM2ForCausalLM
    MiniMaxM3SparseForCausalLM MiniMaxM3SparseForConditionalGeneration Ministral3ForCausalLM
    Mistral3ForConditionalGeneration MistralForCausalLM MistralLarge3ForCausalLM MixtralForCausalLM
    MllamaForConditionalGeneration MossVLForConditionalGeneration MultiModalityCausalLM MuseGlimmerForCausalLM
    MuseGlimmerForConditionalGeneration MuseSparkForConditionalGeneration NanbeigeForCausalLM
    NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2 NemotronH_Omni_Reasoning_V3 NemotronHForCausalLM
    NemotronHPuzzleForCausalLM NVILAForConditionalGeneration NVILALiteForConditionalGeneration Olmo2ForCausalLM
    OlmoeForCausalLM OlmoForCausalLM OPTForCausalLM OrionForCausalLM PaddleOCRVLForConditionalGeneration
    PersimmonForCausalLM Phi3ForCausalLM Phi3SmallForCausalLM Phi4MMForCausalLM PhiForCausalLM PhiMoEForCausalLM
    PixtralForConditionalGeneration POINTSV15ChatModel Qwen2_5_VLForConditionalGeneration
    Qwen2AudioForConditionalGeneration Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen2VLForConditionalGeneration
    Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration
    Qwen3ASRForConditionalGeneration Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM
    Qwen3OmniMoeForConditionalGeneration Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration
    Qwen4ExpForConditionalGeneration QWenLMHeadModel Sarashina2VisionForCausalLM SarvamMLAForCausalLM
    SarvamMoEForCausalLM SDARForCausalLM SDARMoeForCausalLM SolarForCausalLM Spark2_5ForCausalLM StableLmForCausalLM
    Starcoder2ForCausalLM Step3p5ForCausalLM Step3p7ForConditionalGeneration Step3VLForConditionalGeneration
    StepVLForConditionalGeneration TeleFLMForCausalLM TorchNativeLlamaForCausalLM TorchNativePhi3ForCausalLM
    UnlimitedOCRForCausalLM VoxtralForConditionalGeneration WhisperForConditionalGeneration XllmForCausalLM
    XverseForCausalLM XverseMoeForCausalLM YiVLForCausalLM ZayaForCausalLM
    """),
    asks=("is_backend_compatible",),
    refuses={
        "OlmoForCausalLM": "it builds attention without quantized weights",
    },
    refuses_experts={
        "GptOssForCausalLM": "it reads the experts of a layer as one tensor only",
    },
    experts_in_16_bit=_names("DbrxForCausalLM"),
)

UNSPLIT: Mapping[str, str] = {
    "DbrxExpertGLU": "SGLang 0.5.23 reads them in 16 bit alone, vLLM 0.33.0 in no form, and gptqmodel 7.7 in a model "
    "that was converted for code of its own",
    "JetMoeParallelExperts": "vLLM 0.33.0 runs them by transformers' code, which holds them in 16 bit; SGLang 0.5.23 "
    "has no such class, gptqmodel 7.7 no definition of it",
    "InklingSharedExperts": "vLLM 0.33.0 builds them in 16 bit, and gptqmodel 7.7 leaves them so",
}
"""Class of transformers that holds experts in a form of its own -> why nobody reads these quantized.

Read 2026-11-30 (vLLM: models/dbrx.py, models/transformers/moe.py, models/inkling; SGLang: models/dbrx.py; gptqmodel:
models/definitions). What vLLM does with DBRX was seen in 0.32.0, whose file is the same.
"""
